"""Trials as jobs of SLURM, through submitit."""

import logging
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.sweeps.expand import Trial
from lcx.sweeps.folder import Folder
from lcx.sweeps.local import command
from lcx.sweeps.run import SAVED
from lcx.sweeps.spec import Sweep

TIMEOUT = 24 * 60  # minutes of a job, where the sweep says nothing
ENDED = dict.fromkeys(("CANCELLED", "PREEMPTED", "TIMEOUT", "REQUEUED"), SAVED)  # a job that left no exit code


def starter(sweep: Sweep, folder: Folder) -> Callable[[Trial], "Job"]:
    """What submits a trial as a job. Raises UserError where there is no SLURM, no submitit, or an unknown option."""
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: there is no SLURM here (no sbatch); leave it out to run the trials on this machine.")
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'lcx[sweep]'.") from None
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns at each look where SLURM keeps no accounts
    executor = submitit.SlurmExecutor(folder=folder.path / "slurm")
    try:
        executor.update_parameters(**{"time": TIMEOUT, "job_name": "lcx", **sweep.slurm})
    except (ValueError, TypeError) as error:
        raise UserError(f"slurm of the sweep: {' '.join(str(error).split())}") from None

    def start(trial: Trial) -> Job:
        log = folder.log(trial.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        code = folder.path / "slurm" / f"{trial.name}.exit"
        code.unlink(missing_ok=True)
        return Job(executor.submit(call, command(folder, trial), str(log), str(code)), code)

    return start


def call(words: list[str], log: str, code: str) -> None:
    """Runs a command in a job, which passes SLURM's signals on to it; writes its exit code to the file `code`."""
    with open(log, "ab") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda received, _: received != signal.SIGCONT and process.send_signal(signal.SIGTERM))
    Path(code).write_text(str(process.wait()))


class Job:
    """A trial that runs as a job."""

    def __init__(self, job: Any, code: Path):
        self._job, self._code = job, code

    def poll(self) -> int | None:
        """What the job wrote down, or what its state says; submitit's own results, which are pickles, are not read."""
        if self._code.exists() and (text := self._code.read_text()):
            return int(text)
        if not self._job.done():
            return None
        return ENDED.get(self._job.state.split()[0], 1)

    def stop(self) -> None:
        self._job.cancel(check=False)

    kill = stop
