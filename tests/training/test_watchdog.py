"""Processes that are stuck, or gone, or near their deadline."""

import subprocess
import sys
import textwrap
import threading
import time
from datetime import datetime

import pytest

from lcx.cli.main import main
from lcx.errors import UserError
from lcx.training import preemption
from lcx.training.heartbeats import GONE, LEFT, Heartbeat, Peers
from lcx.training.watchdog import Watchdog


def test_a_stuck_step_says_where_it_stands_and_ends():
    program = """
        import time
        from lcx.training.watchdog import Watchdog
        watchdog = Watchdog(0.5)
        def hangs_here():
            time.sleep(60)
        with watchdog.watching():
            for step in range(3):
                watchdog.beat(step)
                time.sleep(0.2)
            with watchdog.paused():
                time.sleep(1)
            watchdog.beat(7)
            hangs_here()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75
    assert "hangs_here" in done.stderr and "nothing has come of step 7 for 0.5 seconds" in done.stderr.splitlines()[-1]


def test_what_is_not_watched_may_take_its_time():
    left = []
    watchdog = Watchdog(0.1, left.append)
    with watchdog.watching():
        watchdog.beat(1)
    time.sleep(0.3)
    with Watchdog(0, left.append).watching():
        time.sleep(0.2)
    assert not left and watchdog.slowest_step >= 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("+90", 1090.0),
        ("+1h30m", 1000.0 + 5400),
        ("+2d5s", 1000.0 + 172805),
        ("1800000000", 1.8e9),
        ("2026-11-22T18:00:00Z", datetime.fromisoformat("2026-11-22T18:00:00+00:00").timestamp()),
        ("2026-11-22 18:00", datetime(2026, 11, 22, 18).timestamp()),
    ],
)
def test_deadlines(text, expected):
    assert preemption.parse_deadline(text, 1000.0) == expected


@pytest.mark.parametrize("text", ["+", "soon", "+1x", "18:00", "+-5", "-5", "", "+h"])
def test_what_is_no_deadline(text, capsys):
    with pytest.raises(ValueError):
        preemption.parse_deadline(text, 1000.0)
    if text:
        assert main(["train", "--config=configs/samba.py", "--workdir=runs/never", f"--stop_at={text}"]) == 2
        assert "is no time" in capsys.readouterr().err


def test_a_deadline_that_is_over(capsys):
    assert main(["train", "--config=configs/samba.py", "--workdir=runs/never", "--stop_at=2020-01-01"]) == 2
    assert "is over" in capsys.readouterr().err


def test_a_deadline_leaves_time_for_the_save(monkeypatch, capsys):
    monkeypatch.setattr(preemption, "MARGIN", 0.1)
    try:
        preemption.stop_at(time.time() + 1.0, lambda: 0.6)
        time.sleep(0.1)
        assert not preemption.interrupted.is_set()
        time.sleep(0.6)
        assert preemption.interrupted.signal_name == "--stop_at"
    finally:
        preemption.interrupted.clear()
    assert "a save needs up to 0.6 seconds" in capsys.readouterr().out


class Left(Exception):
    """A process ended."""


def peers(folder, index, count, ended):
    def leave(code):
        ended[index] = code
        sys.exit()  # of the thread

    return Peers(folder, index, count, 0.6, leave)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_is_gone_ends_all_others(tmp_path, capfd):
    """Of three, the third: the first one sees it, and tells the second one."""
    ended = {}
    first, second = (peers(tmp_path, index, 3, ended) for index in (0, 1))
    third = Heartbeat(tmp_path / "2", 0.6)
    third.__enter__()
    with first.watching(), second.watching():
        time.sleep(1.0)
        assert not ended
        third.__exit__()
        deadline = time.monotonic() + 5
        while len(ended) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == {0: 75, 1: 75}
    assert capfd.readouterr().err.count("process 2 of 3 has not answered for 0.6 seconds") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_that_is_done_is_not_missed(tmp_path):
    ended = {}
    (tmp_path / "1").write_text(f"{GONE}1")  # of a run before this one
    (tmp_path / "0").write_text(LEFT)
    begun, done = threading.Event(), threading.Event()

    def other():
        with peers(tmp_path, 1, 2, ended).watching():
            begun.set()
            time.sleep(0.3)
        done.set()

    threading.Thread(target=other).start()
    with peers(tmp_path, 0, 2, ended).watching():
        assert begun.wait(5) and done.wait(5)
        time.sleep(1.0)
    assert not ended and (tmp_path / "1").read_text() == LEFT


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_waits_for_the_verdict(tmp_path):
    """What a collective raises where another process is gone says nothing; the user's own errors do not wait."""
    ended = {}
    began = time.monotonic()
    with pytest.raises(UserError), peers(tmp_path, 0, 1, ended).watching():
        raise UserError("at once")
    assert time.monotonic() - began < 0.4
    with pytest.raises(Left), peers(tmp_path, 0, 2, ended).watching():
        raise Left
    assert time.monotonic() - began > 0.6 and ended == {0: 75}
