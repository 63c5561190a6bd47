"""Runs that are killed, or asked to stop, end as the run that was left alone: bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

COMMAND = [
    sys.executable,
    "scripts/train.py",
    "--config=configs/samba.py:size=tiny,sequence_length=128",
    "--config.train.batch_size=4",
    "--config.checkpoint.every=5",
    "--config.logging.every=1",
    "--config.logging.tensorboard=false",
    "--config.evaluation.max_rows=4",
]
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(Path(".cache/drills").absolute())}


class Run:
    """One process of a run, in a session of its own, so that what it leaves behind can be found."""

    def __init__(self, workdir: Path, steps: int):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, f"--config.train.steps={steps}", f"--workdir={workdir}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool], limit: float = 120.0) -> None:
        """Returns when the condition holds; fails where the process ends, or the time, before that."""
        deadline = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None, f"the run ended by itself:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"nothing happened for {limit} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.0005)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert survivors(self.process.pid) == [], "a process outlived its run"

    def finish(self, code: int = 0) -> str:
        assert self.process.wait(timeout=300) == code, self.log.read_text()[-3000:]
        return self.log.read_text()


def survivors(session: int) -> list[int]:
    """The processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def logged(workdir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def saving(workdir: Path) -> bool:
    """A checkpoint has been begun and is not committed."""
    names = {path.name for path in (workdir / "checkpoints").glob("*")}
    folders = {name.split(".")[0] for name in names if not name.endswith(".json")}
    return any(f"{step}.manifest.json" not in names for step in folders)


def final_state(checkpoint: Path) -> dict[tuple, np.ndarray]:
    """All arrays of a checkpoint: parameters, optimizer, counters and the random key's data."""
    state = ocp.tree.to_flat_dict(ocp.PyTreeCheckpointer().restore(checkpoint))
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return {name: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for name, leaf in state.items()}


def assert_same_run(found: Path, expected: Path, steps: int) -> None:
    """Final parameters, the whole state and every logged number that time does not enter: bitwise equal."""
    states = [final_state(path / "checkpoints" / str(steps)) for path in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for name in states[1]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg="/".join(name))
    timeless = [
        [{key: value for key, value in line.items() if "per_second" not in key} for line in logged(path)]
        for path in (found, expected)
    ]
    assert [line["step"] for line in timeless[1]] == list(range(1, steps + 1))
    assert timeless[0] == timeless[1]


def killed_run(workdir: Path, steps: int, kills: int, in_saves: int) -> dict[str, int]:
    """A run that is killed `kills` times, each after a step that was not logged before, `in_saves` inside a save."""
    draw, seen, counts = random.Random(0), 0, {"inside a save": 0, "elsewhere": 0}
    for kill in range(kills):
        run = Run(workdir, steps)
        # No later than the kills that are left can still find new steps.
        wanted = seen + draw.randint(1, max(1, (steps - 20 - seen) // (kills - kill)))
        run.wait_until(lambda wanted=wanted: len(logged(workdir)) >= wanted)
        if counts["inside a save"] < in_saves:
            run.wait_until(lambda: saving(workdir))
        else:
            time.sleep(draw.uniform(0, 0.15))
        run.kill()
        counts["inside a save" if saving(workdir) else "elsewhere"] += 1
        seen = max(seen, len(logged(workdir)))
    Run(workdir, steps).finish()
    return counts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], Path]:
    """The workdir of an uninterrupted run of so many steps, made once."""
    made: dict[int, Path] = {}

    def run(steps: int) -> Path:
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("drill") / "undisturbed"
            Run(made[steps], steps).finish()
        return made[steps]

    return run


def test_two_kills(undisturbed, tmp_path):
    counts = killed_run(tmp_path / "killed", steps=30, kills=2, in_saves=1)
    assert counts["inside a save"] >= 1
    assert_same_run(tmp_path / "killed", undisturbed(30), steps=30)


@pytest.mark.slow
def test_ten_kills(undisturbed, tmp_path):
    counts = killed_run(tmp_path / "killed", steps=200, kills=10, in_saves=4)
    print(f"kills: {counts}")
    assert counts["inside a save"] >= 3
    assert_same_run(tmp_path / "killed", undisturbed(200), steps=200)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_75(undisturbed, tmp_path, number):
    """In the middle of training, away from the steps that save by themselves."""
    workdir = tmp_path / "signalled"
    run = Run(workdir, steps=30)
    run.wait_until(lambda: len(logged(workdir)) >= 7)
    run.process.send_signal(number)
    text = run.finish(75)
    assert "To go on, give the same command" in text and f"--workdir={workdir}" in text
    last = logged(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / f"{last}.manifest.json").exists(), "the last step done is saved"
    Run(workdir, steps=30).finish()
    assert_same_run(workdir, undisturbed(30), steps=30)


def test_a_signal_during_compilation_leaves_at_once(tmp_path):
    run = Run(tmp_path / "compiling", steps=30)
    run.wait_until(lambda: "compiling" in run.log.read_text())
    began = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    run.finish(75)
    assert time.monotonic() - began < 5
    assert logged(tmp_path / "compiling") == []
