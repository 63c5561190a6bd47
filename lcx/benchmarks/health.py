"""What the health checks cost: compiled steps of a tiny SAMBA with and without them."""

from collections.abc import Callable

import jax

from lcx.benchmarks.harness import Result, ratio, seconds_of, take_turns
from lcx.benchmarks.models import stepper
from lcx.config import Config, load_config
from lcx.training import health
from lcx.training.trainer import make_program
from lcx.training.watchdog import Watchdog

PAIRS = 20
LIMIT = 1.02


def health_results(rounds: int) -> list[Result]:
    """The step with its checks over the step without; at least PAIRS pairs that take turns."""
    calls = {name: _steps(skip) for name, skip in (("with", True), ("without", False))}
    timings = take_turns(calls, max(rounds, PAIRS))
    found = ratio(timings["with"], timings["without"])
    details = seconds_of(timings) | {"pairs": max(rounds, PAIRS)}
    what = "train step of the tiny SAMBA, with health checks over without: time"
    return [Result(what, found, "x", f"below {LIMIT}", found < LIMIT, details)]


def _steps(skip: bool) -> Callable[[], None]:
    """What makes one step as the trainer does: the compiled step, and what is looked at after it."""
    config = load_config("configs/samba.py:size=tiny")
    config.health.skip = skip
    program = make_program(Config.from_dict(config))
    step, watchdog, over = stepper(program), Watchdog(0), jax.device_get(program.create().health)

    def call() -> None:
        jax.block_until_ready(step())
        if skip:
            watchdog.beat(1)
            health.index_from(1, over)

    return call
