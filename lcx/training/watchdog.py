"""A process whose step does not end says where it stands, and ends."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lcx.errors import Unresponsive


class Watchdog:
    """Watches the time from step to step.

    Where a step takes too long (a device that hangs, a collective that waits for ever), the stacks of all threads are
    written to standard error, and the process ends with the code that lets a scheduler start it again. Nothing can be
    saved then: what would have to be read from the devices is what hangs.
    """

    def __init__(self, limit: float, leave: Callable[[int], None] = os._exit):
        """limit: seconds from one step to the next; 0 watches nothing. leave: ends the process, given its code."""
        self._limit, self._leave = limit, leave
        self._step, self._since = 0, None  # None: nothing is watched now
        self._seconds = 0.0

    @property
    def slowest_step(self) -> float:
        """Seconds that a step has taken, at most; saves that it waited for are among them."""
        return self._seconds

    def beat(self, step: int) -> None:
        """Says that a step was begun."""
        now = time.monotonic()
        if self._since is not None:
            self._seconds = max(self._seconds, now - self._since)
        self._step, self._since = step, now

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the context lasts, from now on."""
        self._since = time.monotonic()
        ended = threading.Event()
        if self._limit:
            threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._since = None
            ended.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time does not count while the context lasts: a compilation or an evaluation may be long."""
        self._since = None
        try:
            yield
        finally:
            self._since = time.monotonic()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(min(1.0, self._limit / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._limit:
                sys.stderr.write("the stacks of all threads:\n")
                sys.stderr.flush()
                faulthandler.dump_traceback(sys.__stderr__)
                sys.stderr.write(
                    f"error: nothing has come of step {self._step} for {self._limit:g} seconds "
                    "(health.step_timeout): it is stuck; the stacks above say where. The same command goes on from the "
                    "newest checkpoint.\n"
                )
                sys.stderr.flush()
                self._leave(Unresponsive.exit_code)
