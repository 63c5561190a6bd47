"""Trials as processes of this machine."""

import os
import signal
import subprocess
import sys

from lcx.sweeps.expand import Trial
from lcx.sweeps.folder import Folder


def command(folder: Folder, trial: Trial) -> list[str]:
    """What runs a trial: `lcx train` in a process that ends when the one that waits for it does."""
    config, workdir = folder.config(trial.name), folder.workdir(trial.name)
    return [sys.executable, "-m", "lcx.cli.trial", f"--config={config}", f"--workdir={workdir}"]


class Process:
    """A trial that runs here, in a session of its own: a Ctrl-C is the sweep's to pass on."""

    def __init__(self, folder: Folder, trial: Trial, environment: dict[str, str] | None = None):
        log = folder.log(trial.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command(folder, trial), f"--parent={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
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
