"""Several processes of this machine: their environment, their words and their end."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcx.errors import UserError
from lcx.parallel import processes

SCRIPT = Path(__file__).parents[2] / "launch" / "local.py"
HELLO = """
import os, sys, time
index = int(os.environ["JAX_PROCESS_ID"])
print("process", index, "of", os.environ["JAX_NUM_PROCESSES"], sys.argv[1:], os.environ["XLA_FLAGS"].split("=")[-1])
"""


def launch(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(code)
    command = [sys.executable, SCRIPT, *words[:-1], folder / "script.py", words[-1]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_each_is_told_of_the_others(tmp_path):
    done = launch(tmp_path, HELLO, "-n", "3", "--devices=4", "--config=-n")
    assert done.returncode == 0, done.stderr
    expected = {f"{'' if index == 0 else f'[{index}] '}process {index} of 3 ['--config=-n'] 4" for index in range(3)}
    assert set(done.stdout.splitlines()) == expected


def test_one_that_fails_ends_the_others(tmp_path):
    code = HELLO + "time.sleep(300) if index == 0 else sys.exit(75)"
    start = time.monotonic()
    done = launch(tmp_path, code, "-n", "2", "word")
    assert done.returncode == 75 and time.monotonic() - start < 40


@pytest.mark.parametrize("words", [["-n", "0", "x.py"], [], ["missing.py"]])
def test_what_cannot_be_run_is_said(words):
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES=two and JAX_PROCESS_ID=0 must be numbers",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2",
        ),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        processes.join()
    assert sentence in str(refused.value)
