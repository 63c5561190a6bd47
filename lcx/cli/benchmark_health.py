"""What the health checks cost: compiled steps of a tiny SAMBA with and without them."""

from collections.abc import Callable

import jax
import numpy as np

from lcx.benchmarks.harness import Result, ratio, take_turns
from lcx.config import Config, default_config
from lcx.training import health
from lcx.training.trainer import lower_step, make_program
from lcx.training.watchdog import Watchdog

MIXERS = {
    "mamba": {"type": "mamba"},
    "mlp": {"type": "mlp", "d_ff": 384},
    "swa": {"type": "attention", "num_heads": 8, "num_kv_heads": 8, "window": 128},
}
ROWS, TIME, PAIRS = 8, 512, 20
LIMIT = 1.02


def health_results(rounds: int) -> list[Result]:
    """The step with its checks over the step without; at least PAIRS pairs that take turns."""
    calls = {name: _steps(skip) for name, skip in (("with", True), ("without", False))}
    timings = take_turns(calls, max(rounds, PAIRS))
    found = ratio(timings["with"], timings["without"])
    details = {f"{name}_seconds": timing.median for name, timing in timings.items()} | {"pairs": max(rounds, PAIRS)}
    what = f"train step of a tiny SAMBA, B={ROWS} T={TIME}, with health checks over without: time"
    return [Result(what, found, "x", f"below {LIMIT}", found < LIMIT, details)]


def _steps(skip: bool) -> Callable[[], None]:
    """What makes one step as the trainer does: the compiled step, and what is looked at after it."""
    values = default_config().to_dict()
    values["model"] |= {"pattern": "mamba mlp swa mlp", "mixers": MIXERS, "periods": 2}
    values["train"] |= {"batch_size": ROWS, "sequence_length": TIME}
    values["mesh"] |= {"data": jax.device_count()}
    values["health"] |= {"skip": skip}
    program = make_program(Config.from_dict(values))
    state, step = program.create(), lower_step(program).compile()
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (ROWS, TIME + 1), np.int32)
    batch = program.put(
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones((ROWS, TIME), np.int32),
            "positions": np.arange(TIME, dtype=np.int32)[None].repeat(ROWS, 0),
            "loss_weights": np.ones((ROWS, TIME), np.float32),
            "row_index": np.arange(ROWS, dtype=np.int32),
        }
    )
    watchdog, over = Watchdog(0), jax.device_get(state.health)

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        if skip:
            watchdog.beat(1)
            health.index_from(1, over)
            assert not metrics["skipped"]

    return call
