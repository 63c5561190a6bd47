"""Runs of several processes, over real collectives: the numbers, checkpoints and ends of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lcx
from lcx.params import split

pytestmark = pytest.mark.slow

STEPS = 50
CONFIG = [
    "scripts/train.py",
    "--config=configs/samba.py:size=tiny,sequence_length=64",
    "--config.model.periods=1",
    "--config.train.batch_size=4",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.mesh.seq=2",
    "--config.optimizer.schedule=constant",  # a run of fewer steps has the same one
    "--config.optimizer.warmup_steps=5",
    "--config.optimizer.learning_rate=1e-3",
    "--config.checkpoint.every=25",
    "--config.logging.every=1",
    "--config.logging.tensorboard=false",
    "--config.evaluation.max_rows=4",
]
TWO = [sys.executable, "launch/local.py", "-n", "2", "--devices=2", *CONFIG]
ONE = [sys.executable, *CONFIG]
CACHE = {"JAX_COMPILATION_CACHE_DIR": str(Path(".cache/drills").absolute())}
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def start(command: list[str], workdir: Path, steps: int = STEPS, *more: str) -> subprocess.Popen:
    flags = FOUR_DEVICES if command is ONE else {"XLA_FLAGS": ""}
    words = [*command, f"--config.train.steps={steps}", f"--workdir={workdir}", *more]
    with workdir.with_suffix(".log").open("ab") as log:
        environment = os.environ | CACHE | flags
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen, workdir: Path, code: int = 0) -> str:
    found, said = process.wait(timeout=500), workdir.with_suffix(".log").read_text()
    assert found == code, said[-3000:]
    return said


def logged(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def compare(found: list[dict], expected: list[dict]) -> None:
    """The same batches, losses to 1e-6."""
    assert [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected]
    losses = [[line["loss"] for line in lines] for lines in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The workdir of the same run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(ONE, workdir), workdir)
    return workdir


def test_two_processes_are_one(alone, tmp_path):
    said = finish(start(TWO, tmp_path / "run"), tmp_path / "run")
    compare(logged(tmp_path / "run"), logged(alone))
    assert len(logged(alone)) == STEPS
    scores = [
        json.loads((workdir / "evaluation/heldout.json").read_text())["loss"] for workdir in (tmp_path / "run", alone)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-6)
    assert said.count("held-out loss") == 1  # the first process speaks for both
    files = [sorted(path.name for path in (workdir / "checkpoints").iterdir()) for workdir in (tmp_path / "run", alone)]
    assert files[0] == files[1] == ["25", "25.manifest.json", "50", "50.manifest.json"]


def test_a_signal_to_one_stops_all_and_any_number_goes_on(alone, tmp_path):
    """SIGTERM to one of two; then one process goes on, and two again."""
    workdir = tmp_path / "run"
    process = start(TWO, workdir)
    deadline = time.monotonic() + 400
    while len(logged(workdir)) < 7:
        assert process.poll() is None and time.monotonic() < deadline, workdir.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(children(process.pid)[-1], signal.SIGTERM)  # the other one learns of it from the mesh
    finish(process, workdir, code=75)
    reached = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert 7 <= reached < STEPS
    finish(start(ONE, workdir, reached + 5), workdir)
    finish(start(TWO, workdir), workdir)
    compare(logged(workdir), logged(alone))
    params = [split(lcx.load(path)[0])[1] for path in (workdir, alone)]
    for found, expected in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_processes_that_differ_stop_with_a_sentence(tmp_path):
    """The seed of one process is another one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv = [*sys.argv, '--config.data.seed=' + os.environ['JAX_PROCESS_ID']]\n"
        f"runpy.run_path({str(Path('scripts/train.py').absolute())!r}, run_name='__main__')\n"
    )
    words = [*TWO[:5], str(script), *CONFIG[1:], f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=400, env=os.environ | CACHE | {"XLA_FLAGS": ""}
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists(), done.stdout + done.stderr
    assert "process 1 of 2 has another config than process 0" in done.stderr and "Traceback" not in done.stderr


def children(pid: int) -> list[int]:
    """The processes that a process has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
