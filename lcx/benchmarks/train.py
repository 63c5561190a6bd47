"""A whole training step beside the same model's in PyTorch."""

from collections.abc import Callable

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
EASYDEL = {"transformer": "Llama", "mamba": "Mamba"}
NAMES = {"transformer": "Llama (SDPA)", "mistral": "Mistral (SDPA)", "mamba": "Mamba (mambapy)"}


def train_results(rounds: int, easydel: str | None = None) -> list[Result]:
    """Beside transformers where that is installed, and beside EasyDeL by the Python that has it."""
    results = []
    for family, batch, time, wanted in BESIDE:
        packages = ("torch", "transformers", *(["mambapy"] if family == "mamba" else []))
        theirs = {}
        if peers.available(*packages):
            theirs[f"transformers' {NAMES[family]}"] = peers.train_step(family, batch, time)
        if easydel and family in EASYDEL and time <= 1024:
            theirs[f"EasyDeL's {EASYDEL[family]}"] = peers.easydel_step(easydel, family, batch, time)
        if theirs:
            results += beside(family, batch, time, wanted, theirs, rounds)
    return results + ([python_loop(rounds)] if peers.available("torch", "transformers") else [])


def beside(
    family: str, batch: int, time: int, wanted: float | None, theirs: dict[str, Callable], rounds: int
) -> list[Result]:
    """Our step and the same model's of the peers, in turns. `wanted` is of the first peer."""
    timings = take_turns({"ours": waiting(train_step(make_config(family, batch, time)))} | theirs, rounds)
    results = []
    for peer in theirs:
        value = ratio(timings[peer], timings["ours"])
        name = f"{family} train step, B={batch} T={time:,}, over {peer}: tokens/s"
        details = seconds_of({who: timings[who] for who in ("ours", peer)}, batch * time)
        promise = (f"at least {wanted}", value >= wanted) if wanted and peer.startswith("transformers") else ("", None)
        results.append(Result(name, value, "x", *promise, details))
    return results


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
