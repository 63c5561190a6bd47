"""Trials as processes of this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from lcx.sweeps.expand import Trial
from lcx.sweeps.folder import Folder


def command(folder: Folder, trial: Trial) -> list[str]:
    """What runs a trial: `lcx train` in a process that ends when the one that waits for it does."""
    config, workdir = folder.config(trial.name), folder.workdir(trial.name)
    return [sys.executable, "-m", "lcx.cli.trial", f"--config={config}", f"--workdir={workdir}"]


class Local:
    """Begins trials here, `jobs` of them at a time; where there are as many GPUs, each has GPUs of its own."""

    def __init__(self, folder: Folder, jobs: int):
        self._folder, self._shares = folder, shares(visible_gpus(), jobs)
        self._running: dict[int, Process] = {}  # by place, of which there are as many as jobs

    def __call__(self, trial: Trial) -> "Process":
        place = next(
            place
            for place in range(len(self._shares))
            if place not in self._running or self._running[place].poll() is not None
        )
        gpus = self._shares[place]
        process = Process(self._folder, trial, {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        self._running[place] = process
        return process


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    found = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(found.glob("*"))))]


def shares(gpus: list[str], jobs: int) -> list[list[str]]:
    """Equal shares of the GPUs for so many trials at a time; nothing is shared out where there are too few."""
    each = len(gpus) // jobs
    return [gpus[place * each : (place + 1) * each] if jobs > 1 else [] for place in range(jobs)]


class Process:
    """A trial that runs here, in a session of its own: a Ctrl-C is the sweep's to pass on."""

    def __init__(self, folder: Folder, trial: Trial, environment: dict[str, str]):
        log = folder.log(trial.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command(folder, trial), f"--parent={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # the reading processes of a run as well
        except ProcessLookupError:
            pass
        self._process.wait()
