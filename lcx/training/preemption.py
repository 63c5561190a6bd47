"""Being asked to stop: SIGTERM from a scheduler, SIGINT from Ctrl-C.

Imports the standard library alone, so that `install()` can run before the heavy imports. Python runs signal handlers
between bytecodes of the main thread, so the main thread must not sit in one long call into C++: what takes long
(a compilation) goes through `run_interruptible`.
"""

import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

DONE = object()  # what `run_interruptible` waits for
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
