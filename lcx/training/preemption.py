"""Being asked to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C, or a deadline that comes near.

Imports the standard library alone, so that `install()` can run before the heavy imports. Python runs signal handlers
between bytecodes of the main thread, so the main thread must not sit in one long call into C++: what takes long
(a compilation) goes through `run_interruptible`.
"""

import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

Result = TypeVar("Result")

DONE = object()  # what `run_interruptible` waits for
MARGIN = 5.0  # seconds between a save and the deadline: for the process to end, and for what was not measured
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The process was asked to stop."""


class Interruption:
    """Whether the process was asked to stop, and by what.

    Like a `threading.Event`, but free of locks: the handler of a second signal may run in the midst of the first's, and
    either in the midst of any call of the main thread on this object.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self.patient = False  # one of several processes: none may leave what all of them compute together
        self._waiting: queue.SimpleQueue | None = None  # its put is reentrant

    def is_set(self) -> bool:
        return self.signal_name is not None

    def set(self, signal_name: str) -> None:
        self.signal_name = self.signal_name or signal_name
        if self._waiting is not None:
            self._waiting.put(None)

    def clear(self) -> None:
        self.signal_name = None


interrupted = Interruption()


def install() -> None:
    """Installs the handlers; call it in the main thread, as early as can be.

    From then on SIGTERM and SIGINT do nothing but set `interrupted` and, the first of them, say so on standard error:
    an impatient second Ctrl-C does not kill the save.
    """
    for number in SIGNALS:
        signal.signal(number, _handle)


def _handle(number: int, frame: Any) -> None:
    first, name = not interrupted.is_set(), signal.Signals(number).name
    interrupted.set(name)
    if first:  # unbuffered: print may not be entered twice
        try:
            os.write(2, f"\n{name}: saving and leaving.\n".encode())
        except OSError:
            pass  # nobody reads standard error


def stop_at(deadline: float, needed: Callable[[], float]) -> None:
    """Sets `interrupted` as soon as what is left until the deadline is what a save needs, and some seconds.

    Args:
      deadline: seconds since 1970.
      needed: how long the process goes on after being asked to stop, in seconds, as far as is known now.
    """

    def wait() -> None:
        while not interrupted.is_set():
            left = deadline - time.time() - needed() - MARGIN
            if left <= 0:
                interrupted.set("--stop_at")
                print(f"\n--stop_at: a save needs up to {needed():.1f} seconds: saving and leaving.", flush=True)
                return
            time.sleep(min(left, 1.0))

    threading.Thread(target=wait, name="deadline", daemon=True).start()


def parse_deadline(text: str, now: float) -> float:
    """Seconds since 1970 of "2026-11-22T18:00" (in local time, or with an offset or Z), of "+90", "+90m", "+1h30m" from
    now on, or of a number of seconds since 1970, as SLURM_JOB_END_TIME has it. Raises ValueError for anything else."""
    if text.startswith("+"):
        units = re.fullmatch(r"\+(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
        if units is None:
            raise ValueError(text)
        days, hours, minutes, seconds = (int(unit or 0) for unit in units.groups())
        return now + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return float(text) if text.isdigit() else datetime.fromisoformat(text).timestamp()


def run_interruptible(function: Callable[[], Result]) -> Result:
    """Runs `function()` in a thread and returns its result, or raises its exception, or `Interrupted` at a signal.

    Where `interrupted.patient` is set a signal is left to whoever asks `interrupted` next.

    After `Interrupted` the thread goes on; leave by `os._exit`. Contexts that belong to a thread (JAX's ambient mesh,
    enabled x64) are entered inside `function`, not around this call.
    """
    waiting = queue.SimpleQueue()
    interrupted._waiting = waiting
    outcome = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error
        waiting.put(DONE)

    try:
        if interrupted.patient or not interrupted.is_set():
            threading.Thread(target=run, name="interruptible", daemon=True).start()
            while waiting.get() is not DONE and interrupted.patient:
                pass
    finally:
        interrupted._waiting = None
    if interrupted.is_set() and not interrupted.patient:
        raise Interrupted(interrupted.signal_name)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
