"""Processes that say, again and again, that they live: how a run notices that one of its processes is gone, and how a
workdir on object storage is held by one run.

A heartbeat is a small file that its writer changes every few seconds. Whoever reads it compares contents and uses its
own clock, so that the clocks of machines need not agree.
"""

import ctypes
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from etils import epath

from lcx.errors import Unresponsive, UserError
from lcx.training.preemption import Interrupted

BEATS = 6  # in the time after which a heartbeat has stopped
GONE = "gone:"  # what the first process writes instead of a beat: which process the run has lost
LEFT = "left"  # the last beat of a process that is done


class Heartbeat:
    """Writes one heartbeat from a thread, while the context lasts."""

    def __init__(self, path: epath.PathLike, timeout: float, look: Callable[[], None] = lambda: None):
        """timeout: seconds after which readers take the writer to be gone. look: called after each beat."""
        self.path, self.owner = epath.Path(path), uuid.uuid4().hex
        self._interval, self._look, self._ended = timeout / BEATS, look, threading.Event()
        self.farewell = ""  # what is left behind in the file; "": no file
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write(f"{self.owner} 0")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.farewell:
            self.write(self.farewell)
        elif read(self.path).startswith(self.owner):
            self.path.unlink(missing_ok=True)

    def write(self, text: str) -> None:
        """Puts the file; a beat that cannot be written is left out, and the next one tried."""
        try:
            self.path.write_text(text)
        except OSError:
            pass

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(self._interval):
            count += 1
            self._look()
            self.write(f"{self.owner} {count}")


def read(path: epath.Path) -> str:
    """What a heartbeat's file holds now; "" where there is none, or it is just being written."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


class Peers:
    """The processes of a run, each of which ends where another one is gone.

    The first process watches all, and all watch the first: it tells the others which one it has lost.
    """

    def __init__(self, folder: epath.PathLike, index: int, count: int, timeout: float, leave=os._exit):
        """index: of this process among `count`. timeout: seconds without a beat. leave: ends the process, by a code."""
        self._folder, self._index, self._count = epath.Path(folder), index, count
        self._timeout, self._leave = timeout, leave
        watched = [0] if index else range(1, count)
        self._seen = {peer: ("", time.monotonic()) for peer in watched}
        self._heartbeat = Heartbeat(self._folder / str(index), timeout, self._look)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the context lasts.

        An error that is not the user's waits here for the verdict: what a collective raises, or how JAX's own service
        aborts a process, when another one is gone, tells nobody what has happened.
        """
        if self._count == 1:
            yield
            return
        self._seen = {peer: (read(self._folder / str(peer)), time.monotonic()) for peer in self._seen}
        handler = _on_abort(self._wait)
        with self._heartbeat:
            try:
                yield
                self._heartbeat.farewell = LEFT
            except Interrupted:
                self._heartbeat.farewell = LEFT
                raise
            except UserError:
                raise
            except Exception:
                self._wait()
                raise
            finally:
                _release(handler)

    def _wait(self) -> None:
        """Gives the thread the time to find out that a process is gone: it then ends this one."""
        time.sleep(self._timeout + 2 * self._timeout / BEATS)

    def _look(self) -> None:
        for peer, (before, since) in self._seen.items():
            now = read(self._folder / str(peer))
            lost = now.removeprefix(GONE)
            if lost != now and lost.isdigit() and now != before:
                self._end(int(lost))
            elif now and now != before:
                self._seen[peer] = now, math.inf if now == LEFT else time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._end(peer)

    def _end(self, peer: int) -> None:
        self._heartbeat.write(f"{GONE}{peer}")
        sys.stderr.write(
            f"error: process {peer} of {self._count} has not answered for {self._timeout:g} seconds "
            "(health.peer_timeout): it is gone; the same command goes on from the newest checkpoint.\n"
        )
        sys.stderr.flush()
        self._leave(Unresponsive.exit_code)


@contextmanager
def held(path: epath.Path, timeout: float, leave: Callable[[int], None] = os._exit) -> Iterator[None]:
    """Holds a workdir on object storage by a heartbeat in `path`, which stands for a lock.

    A heartbeat that is there is watched for `timeout` seconds: it may be a killed run's. Raises UserError where it goes
    on, or where another process was quicker. A run whose workdir was taken by another one ends, with code 2.
    """
    before = read(path)
    if before and _changes(path, before, timeout):
        raise UserError(f"the workdir {path.parent} is in use by another run; use another --workdir.")

    def look() -> None:
        found = read(path)
        if found and not found.startswith(heartbeat.owner):
            sys.stderr.write(f"error: the workdir {path.parent} was taken over by another run.\n")
            sys.stderr.flush()
            leave(UserError.exit_code)

    heartbeat = Heartbeat(path, timeout, look)
    with heartbeat:
        time.sleep(min(1.0, timeout / BEATS / 2))
        if not read(path).startswith(heartbeat.owner):
            raise UserError(f"the workdir {path.parent} is in use by another run; use another --workdir.")
        yield


def _changes(path: epath.Path, before: str, timeout: float) -> bool:
    """Whether a heartbeat goes on within `timeout` seconds; one that is removed does not."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        time.sleep(min(1.0, timeout / BEATS))
        now = read(path)
        if not now:
            return False
        if now != before:
            return True
    return False


def _on_abort(wait: Callable[[], None]) -> object:
    """Lets an abort from C++ wait. Python's own handlers would run too late: after the return to the interpreter."""

    def handle(number: int) -> None:
        wait()
        _libc().signal(signal.SIGABRT, 0)  # SIG_DFL: the abort goes on

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _libc().signal(signal.SIGABRT, handler)
    return handler  # lives as long as it is installed


def _release(handler: object) -> None:
    _libc().signal(signal.SIGABRT, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
