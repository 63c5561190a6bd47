"""Runs of several processes, over real collectives: the numbers, checkpoints and ends of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import lcx
from lcx.params import split
from tests.drills.runs import FLAGS, Run, committed, devices, logged, make_corpus

pytestmark = pytest.mark.slow

STEPS = 50
LAUNCH = [sys.executable, "launch/local.py", "-n", "2", "--devices={}", "scripts/train.py"]
MESH = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.seq=2"]


def run_alone(workdir: Path, steps: int = STEPS, mesh: Sequence[str] = MESH, count: int = 4) -> Run:
    return Run(workdir, steps, *mesh, environment=devices(count))


def run_two(workdir: Path, steps: int = STEPS, mesh: Sequence[str] = MESH, count: int = 2) -> Run:
    """Two processes with so many devices each."""
    return Run(workdir, steps, *mesh, command=[word.format(count) for word in LAUNCH])


def compare(found: list[dict], expected: list[dict], tolerance: float = 1e-6) -> float:
    """The same batches, losses to a relative tolerance; the largest difference."""
    assert [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected]
    losses = [np.array([line["loss"] for line in lines]) for lines in (found, expected)]
    difference = float(np.max(np.abs(losses[0] / losses[1] - 1)))
    assert difference <= tolerance
    return difference


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The workdir of the same run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run_alone(workdir).finish()
    return workdir


def test_two_processes_are_one(alone, tmp_path):
    workdir = tmp_path / "run"
    said = run_two(workdir).finish()
    compare(logged(workdir), logged(alone))
    assert len(logged(alone)) == STEPS
    scores = [json.loads((path / "evaluation/heldout.json").read_text())["loss"] for path in (workdir, alone)]
    np.testing.assert_allclose(*scores, rtol=1e-6)
    assert said.count("held-out loss") == 1  # the first process speaks for both
    assert committed(workdir) == committed(alone) == [40, 45, 50]


@pytest.mark.long
def test_a_signal_to_one_stops_all_and_any_number_goes_on(alone, tmp_path):
    """SIGTERM to one of two; then one process goes on, and two again."""
    workdir = tmp_path / "run"
    run = run_two(workdir)
    run.wait_until(lambda: len(logged(workdir)) >= 7)
    os.kill(children(run.process.pid)[-1], signal.SIGTERM)  # the other one learns of it from the mesh
    run.finish(75)
    reached = max(committed(workdir))
    assert 7 <= reached < STEPS
    run_alone(workdir, reached + 5).finish()
    run_two(workdir).finish()
    compare(logged(workdir), logged(alone))
    params = [split(lcx.load(path)[0])[1] for path in (workdir, alone)]
    for found, expected in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_processes_that_differ_stop_with_a_sentence(tmp_path):
    """The seed of one process is another one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv = [*sys.argv, '--config.data.seed=' + os.environ['JAX_PROCESS_ID']]\n"
        f"runpy.run_path({str(Path('scripts/train.py').absolute())!r}, run_name='__main__')\n"
    )
    run = Run(tmp_path / "run", STEPS, *MESH, command=[*[word.format(2) for word in LAUNCH[:-1]], str(script)])
    said = run.finish(2)
    assert not (tmp_path / "run").exists()
    assert "process 1 of 2 has another config than process 0" in said and "Traceback" not in said


SEQ = ["--config.mesh.data=1", "--config.mesh.seq=8"]
WIDE = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]


@pytest.mark.long
def test_a_checkpoint_moves_between_meshes_and_processes(tmp_path, record):
    """Saved on seq=8; gone on with on data=2 x fsdp=4, by two processes, and back on seq=8."""
    saved, steps = 10, 30
    reference = tmp_path / "reference"
    run_alone(reference, steps, SEQ, 8).finish()
    moved, back = tmp_path / "moved", tmp_path / "back"
    run_alone(moved, saved, SEQ, 8).finish()
    worst = {}
    run_alone(moved, steps, WIDE, 8).finish()
    worst["seq=8 -> data=2 x fsdp=4"] = compare(logged(moved), logged(reference), 1e-5)
    run_two(back, saved, WIDE, 4).finish()
    run_alone(back, saved + 10, SEQ, 8).finish()
    run_two(back, steps, WIDE, 4).finish()
    worst["two processes, data=2 x fsdp=4 -> seq=8 -> two processes"] = compare(logged(back), logged(reference), 1e-5)
    record(
        f"saved on one mesh, restored on another: losses of the next {steps - saved} steps",
        "; ".join(f"{name}: {value:.1e}" for name, value in worst.items()),
        "to 1e-5",
    )


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_peer_ends_the_other(tmp_path, record, victim):
    """Without a launcher that would end it: by a heartbeat that has stopped, also where the coordinator is gone."""
    bound, workdir = 6, tmp_path / "run"
    make_corpus(tmp_path / "corpus")
    command = [sys.executable, "scripts/train.py", *FLAGS, f"--config.data.sources[0].path={tmp_path / 'corpus'}"]
    command += [f"--workdir={workdir}", "--config.train.steps=100000", "--config.mesh.fsdp=2", "--config.mesh.data=1"]
    command += [f"--config.health.peer_timeout={bound}"]
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{40000 + os.getpid() % 20000 + victim}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(Path(".cache/drills").absolute()),
    }
    running = []
    for index in range(2):
        with (tmp_path / f"{index}.log").open("wb") as log:
            environment = os.environ | shared | devices(1) | {"JAX_PROCESS_ID": str(index)}
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        deadline = time.monotonic() + 300
        while len(committed(workdir)) < 2:
            assert time.monotonic() < deadline and all(process.poll() is None for process in running)
            time.sleep(0.05)
        running[victim].kill()
        killed = time.monotonic()
        assert running[1 - victim].wait(timeout=120) == 75
        waited = time.monotonic() - killed
    finally:
        for process in running:
            process.kill()
            process.wait()
    said = (tmp_path / f"{1 - victim}.log").read_text(errors="replace")
    sentence = f"process {victim} of 2 has not answered for {bound} seconds (health.peer_timeout): it is gone"
    assert sentence in said.splitlines()[-1]
    assert waited < 2 * bound
    record(
        f"process {victim} of two killed",
        f"the other ends after {waited:.1f} s, with a sentence, exit 75",
        f"within a bound (health.peer_timeout = {bound} s here, and a third of it)",
    )


def children(pid: int) -> list[int]:
    """The processes that a process has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
