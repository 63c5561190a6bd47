"""How a training step's speed and memory change with the length of a row."""

import json
import resource
import subprocess
import sys

from lcx.benchmarks.harness import Result, Timing, ratio, seconds_of, take_turns
from lcx.benchmarks.models import make_config, train_step, waiting

MANY, ONE = (32, 2048), (1, 65_536)  # rows and tokens a row of SAMBA: as many tokens a step


def scaling_results(rounds: int) -> list[Result]:
    """Mamba's time a token at two lengths, and SAMBA's speed and memory with one long row."""
    mamba = {f"T={time}": waiting(train_step(make_config("mamba", 2, time))) for time in (1024, 8192)}
    timings = take_turns(mamba, rounds)
    growth = ratio(timings["T=8192"], timings["T=1024"]) / 8
    what = "mamba train step, B=2: time a token at T=8,192 over T=1,024"
    results = [Result(what, growth, "x", "0.85 to 1.15", 0.85 <= growth <= 1.15, seconds_of(timings))]
    return results + one_long_row(MANY, ONE, max(2, rounds // 5))


def one_long_row(many: tuple[int, int], one: tuple[int, int], rounds: int) -> list[Result]:
    """SAMBA, in processes of their own: what a process has once taken of memory it keeps."""
    found: dict[tuple[int, int], list[dict]] = {many: [], one: []}
    for _ in range(rounds):
        for shape, runs in found.items():
            runs.append(in_process("samba", *shape))
    timings = {shape: Timing(tuple(run["seconds"] for run in runs)) for shape, runs in found.items()}
    speed = ratio(timings[many], timings[one])
    memory = max(run["peak_bytes"] for run in found[one]) / min(run["peak_bytes"] for run in found[many])
    what = f"samba train step of {one[1]:,} tokens: tokens/s as one row over {many[0]} rows"
    details = {f"{shape[0]} x {shape[1]}": runs for shape, runs in found.items()}
    return [
        Result(what, speed, "x", "at least 0.6", speed >= 0.6, details),
        Result("the same: peak resident memory", memory, "x", "at most 1.5", memory <= 1.5),
    ]


def in_process(family: str, batch: int, time: int) -> dict[str, float]:
    """Median seconds of three steps after the first, and the peak of resident memory, of a new process."""
    command = [sys.executable, "-m", "lcx.benchmarks.scaling", family, str(batch), str(time)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(family: str, batch: str, time: str) -> None:
    """What `in_process` starts."""
    step = waiting(train_step(make_config(family, int(batch), int(time))))
    timing = take_turns({"step": step}, rounds=3)["step"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": timing.median, "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
