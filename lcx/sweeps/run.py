"""Running trials: so many at a time, each finished once, whatever is killed in between."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lcx.sweeps.expand import Trial
from lcx.sweeps.folder import Folder
from lcx.sweeps.spec import Sweep

MENDABLE, SAVED = 2, 75  # exit codes of a run: the user's to mend; interrupted, the same command goes on
POLL = 0.1  # seconds
GRACE = 120.0  # that trials have to save and leave


class Attempt(Protocol):
    """A trial that is running somewhere."""

    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def stop(self) -> None:
        """Asks it to save and leave."""

    def kill(self) -> None:
        """Ends it, and whatever it has started."""


class Source(Protocol):
    """Where trials come from."""

    def take(self) -> Trial | None:
        """The next trial; None where there is none now."""

    def finish(self, trial: Trial, value: float | None) -> None:
        """Tells what came of it: the metric, or None where it failed."""


class Listed:
    """The trials of a grid, in their order."""

    def __init__(self, trials: list[Trial]):
        self._waiting = list(trials)

    def take(self) -> Trial | None:
        return self._waiting.pop(0) if self._waiting else None

    def finish(self, trial: Trial, value: float | None) -> None:
        pass


@dataclass
class Outcome:
    """What a call of `run` came to, in names of trials."""

    finished: list[str] = field(default_factory=list)  # by this call
    skipped: list[str] = field(default_factory=list)  # that were finished before
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False


@dataclass
class Running:
    trial: Trial
    attempt: Attempt
    number: int  # of the attempt, from 1, in this call
    began: float


def run(
    sweep: Sweep,
    source: Source,
    folder: Folder,
    start: Callable[[Trial], Attempt],
    jobs: int,
    stopped: Callable[[], bool],
    say: Callable[[str], None] = print,
    ended: Callable[[], None] = lambda: None,
) -> Outcome:
    """Runs what the source gives until it has no more.

    A trial that has its result is not run. One that fails goes on where it was, as often as the sweep retries; not one
    that the user has to mend. One that somebody else interrupted goes on without being counted. Where `stopped()`, all
    that runs is asked to save and leave, and waited for.

    Args:
      start: begins an attempt of a trial in its workdir.
      say: is told of each beginning and end.
      ended: is called after each end, and now and then.
    """
    outcome, running, again = Outcome(), [], []

    def launch(trial: Trial, number: int) -> None:
        folder.write_trial(trial)
        folder.record(trial.name, "started", attempt=number)
        running.append(Running(trial, start(trial), number, time.monotonic()))

    def refill() -> None:
        while len(running) < jobs:
            if again:
                launch(*again.pop(0))
                continue
            trial = source.take()
            if trial is None:
                return
            value = folder.result(trial, sweep.metric)
            if value is not None:
                outcome.skipped.append(trial.name)
                source.finish(trial, value)
                continue
            launch(trial, 1)

    def end(job: Running, code: int) -> None:
        running.remove(job)
        seconds = time.monotonic() - job.began
        folder.record(job.trial.name, "ended", attempt=job.number, exit_code=code, seconds=seconds)
        value = folder.result(job.trial, sweep.metric)  # whatever the code: a signal may find a trial that is done
        if value is not None:
            outcome.finished.append(job.trial.name)
            source.finish(job.trial, value)
            number = "" if math.isnan(value) else f"{sweep.metric} {value:.4f}, "
            say(f"finished  {job.trial.name}: {number}{seconds:.0f} s")
        elif code == SAVED:
            again.append((job.trial, job.number))
            say(f"resuming  {job.trial.name}, which was interrupted")
        elif code != MENDABLE and job.number <= sweep.retries:
            again.append((job.trial, job.number + 1))
            say(f"failed    {job.trial.name} with exit code {code}; once more")
        else:
            outcome.failed.append(job.trial.name)
            source.finish(job.trial, None)
            say(f"FAILED    {job.trial.name} with exit code {code}: {last_words(folder, job.trial.name)}")
        ended()

    try:
        while not stopped():
            refill()
            if not running:
                return outcome
            for job in list(running):
                code = job.attempt.poll()
                if code is not None:
                    end(job, code)
            time.sleep(POLL)
        outcome.interrupted = True
        for job in running:
            job.attempt.stop()
        deadline = time.monotonic() + GRACE
        while running and time.monotonic() < deadline:
            for job in list(running):
                code = job.attempt.poll()
                if code is None:
                    continue
                if code == SAVED:  # it goes on with the next call
                    running.remove(job)
                    folder.record(job.trial.name, "interrupted", attempt=job.number)
                else:
                    end(job, code)
            time.sleep(POLL)
        return outcome
    finally:
        for job in running:
            job.attempt.kill()


def last_words(folder: Folder, name: str) -> str:
    """The last line of a trial's log that says something."""
    try:
        lines = folder.log(name).read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
