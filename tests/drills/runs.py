"""Runs as processes of their own, as small as a SAMBA can be: what the drills start, disturb and compare."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

SCRIPT = "scripts/train.py"
FLAGS = [
    "--config=configs/samba.py:size=tiny,sequence_length=32",
    "--config.model.d_model=32",
    "--config.model.periods=1",
    "--config.model.mixers.swa.num_heads=4",
    "--config.model.mixers.swa.num_kv_heads=4",
    "--config.model.mixers.mlp.d_ff=48",
    "--config.train.batch_size=8",
    "--config.optimizer.schedule=constant",  # a run of fewer steps has the same one
    "--config.optimizer.warmup_steps=5",
    "--config.checkpoint.every=5",
    "--config.logging.every=1",
    "--config.logging.tensorboard=false",
    "--config.evaluation.max_rows=8",
]
SECRET = "a-token-that-nobody-may-read"
ENVIRONMENT = {
    "HF_TOKEN": SECRET,
    "WANDB_API_KEY": SECRET,
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(Path(".cache/drills").absolute()),
}


def devices(count: int) -> dict[str, str]:
    """The environment of a process with so many CPU devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def make_corpus(folder: Path) -> Path:
    """Sixty documents of words, some of them held out."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(60):
        words = random.choice(["alpha", "beta", "gamma", "delta", "epsilon"], 200)
        (folder / f"{number}.txt").write_text(f"document {number}: " + " ".join(words))
    return folder


class Run:
    """One process of a run, in a session of its own, so that what it leaves behind can be found."""

    def __init__(
        self,
        workdir: Path,
        steps: int,
        *more: str,
        command: Sequence[str] = (sys.executable, SCRIPT),
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ):
        self.workdir, self.log = workdir, log or workdir.with_suffix(".log")
        corpus = workdir.parent / "corpus"
        if not corpus.exists():
            make_corpus(corpus)
        own = [f"--config.data.sources[0].path={corpus}", f"--config.train.steps={steps}", f"--workdir={workdir}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *FLAGS, *own, *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT | (environment or {}),
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], limit: float = 300.0) -> None:
        """Returns when the condition holds; fails where the process ends, or the time, before that."""
        deadline = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None, f"the run ended by itself:\n{self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"nothing happened for {limit} s:\n{self.said()[-3000:]}"
            time.sleep(0.002)

    def kill(self) -> None:
        """Kills it, and sees to it that nothing of it is left."""
        self.process.kill()
        self.process.wait()
        self.nothing_is_left()

    def finish(self, code: int = 0, limit: float = 600) -> str:
        assert self.process.wait(timeout=limit) == code, self.said()[-3000:]
        self.nothing_is_left()
        files = [path for path in self.workdir.glob("*") if path.is_file()]
        assert not any(SECRET.encode() in path.read_bytes() for path in [self.log, *files])
        return self.said()

    def nothing_is_left(self) -> None:
        """Worker processes see within moments that their parent is gone."""
        deadline = time.monotonic() + 20
        while (left := survivors(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, "a process outlived its run"


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


def timeless(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what time enters."""
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in logged(workdir)]


def committed(workdir: Path) -> list[int]:
    """The steps that have a manifest."""
    return sorted(int(path.name.split(".")[0]) for path in (workdir / "checkpoints").glob("[0-9]*.manifest.json"))


def saving(workdir: Path) -> bool:
    """A checkpoint has been begun and is not committed."""
    names = {path.name for path in (workdir / "checkpoints").glob("*")}
    folders = {name.split(".")[0] for name in names if not name.endswith(".json")}
    return any(f"{step}.manifest.json" not in names for step in folders)


def save_seconds(workdir: Path) -> float:
    """What the slowest save that is still there took."""
    manifests = (workdir / "checkpoints").glob("[0-9]*.manifest.json")
    return max((json.loads(path.read_text())["seconds"] for path in manifests), default=0.0)


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
    assert timeless(found) == timeless(expected)
