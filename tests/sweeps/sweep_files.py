"""Sweeps that take seconds: a corpus of forty short documents, models of one narrow period."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(Path(".cache/drills").absolute())}
SMALL = {
    "model.d_model": 32,
    "model.periods": 1,
    "train.batch_size": 2,
    "train.sequence_length": 64,
    "train.steps": 60,
    "checkpoint.every": 20,
    "logging.every": 1,
    "logging.tensorboard": False,
    "evaluation.max_rows": 4,
    "optimizer.warmup_steps": 2,
}


def make_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number}: " + "a line of words\n" * (20 + number))
    return folder


def write_sweep(path: Path, sweep: dict) -> Path:
    path.write_text(f"def get_sweep(arg=''):\n    return {sweep!r}\n")
    return path


def small_sweep(folder: Path, families: list[str], steps: int = SMALL["train.steps"], **more) -> Path:
    """A sweep file over tiny families."""
    corpus = make_corpus(folder / "corpus")
    sweep = {
        "configs": {family: f"configs/{family}.py:size=tiny" for family in families},
        "set": SMALL | {"train.steps": steps, "data.sources[0].path": str(corpus)},
    }
    return write_sweep(folder / "sweep.py", sweep | more)


class Sweep:
    """One process of a sweep, in a session of its own; its trials have sessions of theirs."""

    def __init__(self, file: Path, workdir: Path, *flags: str):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        command = [sys.executable, "scripts/sweep.py", f"--config={file}", f"--workdir={workdir}", *flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True
            )

    def wait_until(self, condition: Callable[[], bool], limit: float = 600.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert self.process.poll() is None, f"the sweep ended by itself:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"nothing happened for {limit} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.01)

    def finish(self, code: int = 0, limit: float = 3600.0) -> str:
        assert self.process.wait(timeout=limit) == code, self.log.read_text()[-3000:]
        return self.log.read_text()


def trial_processes(workdir: Path) -> list[int]:
    """The processes whose command names the sweep's trials, that are still there."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        if b"lcx.cli.trial" in words and os.fsencode(workdir) in words:
            found.append(int(line.parent.name))
    return found


def journal(workdir: Path) -> list[dict]:
    path = workdir / "journal.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def finished(workdir: Path) -> list[str]:
    """The trials that ended well, once for each time."""
    return [line["trial"] for line in journal(workdir) if line.get("exit_code") == 0]


def steps_logged(workdir: Path, name: str) -> list[int]:
    path = workdir / "trials" / name / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
