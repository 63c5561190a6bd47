import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from lcx.training import preemption
from lcx.training.preemption import Interrupted, interrupted, run_interruptible


def start(body):
    """A Python process that runs `body` after the handlers are installed, and whose first line of output was read."""
    code = "from lcx.training import preemption\npreemption.install()\n" + textwrap.dedent(body)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def finish(process):
    """What else it printed, on both streams; a process that hangs is killed."""
    deadline = threading.Timer(30, process.kill)
    deadline.start()
    streams = process.stdout.read(), process.stderr.read()
    process.wait()
    deadline.cancel()
    return streams


def test_imports_the_standard_library_alone():
    process = start("""
        import sys
        print("ready")
        print(sorted({"jax", "numpy", "flax", "orbax", "etils"} & {name.split(".")[0] for name in sys.modules}))
    """)
    output, errors = finish(process)
    assert output == "[]\n", errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noticed_at_once_during_a_long_call(number):
    """The long call holds no bytecode boundary for half a minute, as a compilation does."""
    process = start("""
        import os, time
        def compile():
            print("ready")
            time.sleep(30)
        try:
            preemption.run_interruptible(compile)
        except preemption.Interrupted as error:
            print("interrupted by", error)
            os._exit(75)
    """)
    sent = time.monotonic()
    process.send_signal(number)
    output, errors = finish(process)
    assert time.monotonic() - sent < 5
    assert process.returncode == 75
    assert output == f"interrupted by {number.name}\n"
    assert errors.count(number.name) == 1 and "Traceback" not in errors


def test_more_signals_do_not_stop_the_save():
    process = start("""
        import time
        print("ready")
        while not preemption.interrupted.is_set():
            time.sleep(0.01)
        print("saving")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            time.sleep(end - time.monotonic())
        print("saved", preemption.interrupted.signal_name)
    """)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.05)
    output, errors = finish(process)
    assert (output, process.returncode) == ("saved SIGINT\n", 0), errors
    assert errors.count("SIG") == 1, "it is said once"


def test_a_storm_of_signals_ends_in_no_deadlock():
    process = start("""
        import time
        print("ready")
        for _ in range(200):
            try:
                preemption.run_interruptible(lambda: time.sleep(0.001))
            except preemption.Interrupted:
                preemption.interrupted.clear()
        print("done")
    """)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    assert process.stdout.read() == "done\n", process.stderr.read()


def test_signals_before_the_imports_are_done_are_kept():
    process = start("""
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
        print("ready")
        try:
            preemption.run_interruptible(lambda: print("ran"))
        except preemption.Interrupted:
            print("never began")
    """)
    assert finish(process)[0] == "never began\n"


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    preemption.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupted.clear()


def test_results_and_errors_pass_through(handlers):
    thread = []

    def function():
        thread.append(threading.current_thread())
        return 42

    assert run_interruptible(function) == 42
    assert thread[0] is not threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        run_interruptible(lambda: 1 / 0)
    assert not interrupted.is_set()


def test_interrupted_names_the_first_signal(handlers, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGINT"):
        run_interruptible(lambda: None)
    assert "SIGINT" in capfd.readouterr().err
