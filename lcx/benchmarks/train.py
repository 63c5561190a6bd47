"""A whole training step beside the same model's in PyTorch."""

from lcx.benchmarks import peers
from lcx.benchmarks.harness import Result, ratio, seconds_of, take_turns
from lcx.benchmarks.models import make_config, train_step, waiting

# What is compared: our family, rows, tokens a row, and the least ratio of our tokens/s to the peer's.
BESIDE = (
    ("transformer", 2, 1024, 1.0),
    ("transformer", 2, 4096, 0.9),
    ("mistral", 2, 4096, None),
    ("mamba", 2, 1024, 8.0),
)
NAMES = {"transformer": "Llama (SDPA)", "mistral": "Mistral (SDPA)", "mamba": "Mamba (mambapy)"}


def train_results(rounds: int) -> list[Result]:
    """Beside transformers, where that is installed."""
    results = []
    for family, batch, time, wanted in BESIDE:
        needs = ("torch", "transformers", "mambapy") if family == "mamba" else ("torch", "transformers")
        if peers.available(*needs):
            results.append(beside(family, batch, time, wanted, rounds))
    if peers.available("torch", "transformers"):
        results.append(python_loop(rounds))
    return results


def beside(family: str, batch: int, time: int, wanted: float | None, rounds: int) -> Result:
    """Our step and the same model's in transformers, in turns."""
    contestants = {
        "ours": waiting(train_step(make_config(family, batch, time))),
        "theirs": peers.train_step(family, batch, time),
    }
    timings = take_turns(contestants, rounds)
    value = ratio(timings["theirs"], timings["ours"])
    name = f"{family} train step, B={batch} T={time:,}, over transformers' {NAMES[family]}: tokens/s"
    holds = None if wanted is None else value >= wanted
    return Result(
        name, value, "x", "" if wanted is None else f"at least {wanted}", holds, seconds_of(timings, batch * time)
    )


def python_loop(rounds: int) -> Result:
    """transformers' Mamba as pip gives it goes through time in Python: on short rows, since it is slow."""
    batch, time = 2, 256
    contestants = {
        "ours": waiting(train_step(make_config("mamba", batch, time))),
        "theirs": peers.train_step("mamba", batch, time, mambapy=False),
    }
    timings = take_turns(contestants, max(1, rounds // 5))
    name = f"mamba train step, B={batch} T={time}, over transformers' Mamba without mambapy: tokens/s"
    return Result(name, ratio(timings["theirs"], timings["ours"]), "x", details=seconds_of(timings, batch * time))
