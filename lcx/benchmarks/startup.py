"""Seconds from a command to a run's first step, with an empty compilation cache and with a filled one."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lcx.benchmarks.harness import Result, Timing

CONFIG = "configs/quickstart.py"
LIMIT = 600.0  # seconds after which a run is given up
WANTED = {"cold": 25, "warm": 12}


def startup_results(rounds: int) -> list[Result]:
    """Of the quickstart, from the repository's root. Cold: nothing that lcx keeps between runs is there."""
    seconds: dict[str, list[float]] = {name: [] for name in WANTED}
    for _ in range(max(1, rounds // 5)):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):
                seconds[name].append(first_step(Path(folder) / "cache", Path(folder) / name))
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return [
        Result(
            f"quickstart, from the command to the first step, {name}",
            timing.median,
            "s",
            f"below {WANTED[name]}",
            timing.median < WANTED[name],
            {"seconds": timing.seconds},
        )
        for name, timing in timings.items()
    ]


def first_step(cache: Path, workdir: Path) -> float:
    """Seconds until the run has logged its first step; it is killed then. Raises RuntimeError where it never does."""
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache / "xla"), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "scripts/train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    begin = time.perf_counter()
    run = subprocess.Popen(
        [*command, "--config.logging.every=1"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        while not has_line(workdir / "metrics.jsonl"):
            if run.poll() is not None or time.perf_counter() - begin > LIMIT:
                raise RuntimeError(f"the run made no step: {run.stderr.read().decode()[-500:]}")
            time.sleep(0.01)
        return time.perf_counter() - begin
    finally:
        run.kill()
        run.communicate()


def has_line(path: Path) -> bool:
    """Whether the file is there and has a whole line."""
    return path.exists() and b"\n" in path.read_bytes()
