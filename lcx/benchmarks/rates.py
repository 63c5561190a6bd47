"""How near a whole step comes to the rate of its own matrix products."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lcx.benchmarks.harness import Result, ratio, seconds_of, take_turns
from lcx.benchmarks.models import LAYERS, VOCABULARY, make_config, train_step, waiting

WIDTH, ROWS, TIME = 1024, 2, 1024


def rate_results(rounds: int) -> list[Result]:
    """A Transformer++ of width 1024: FLOP/s of the step over those of its matrix products alone, in jnp.

    Both counts are of the model: forward, and twice as much backward. The step's includes attention's pairs.
    """
    config = make_config("transformer", ROWS, TIME, width=WIDTH)
    d_ff = config.model.mixers["mlp"]["d_ff"]
    shapes = [(WIDTH, 4 * WIDTH)] * LAYERS + [(WIDTH, 2 * d_ff), (d_ff, WIDTH)] * LAYERS + [(WIDTH, VOCABULARY)]
    timings = take_turns({"step": waiting(train_step(config)), "products": products(shapes, ROWS * TIME)}, rounds)
    flops = 3 * 2 * ROWS * TIME * sum(a * b for a, b in shapes)
    pairs = 3 * ROWS * LAYERS * 4 * WIDTH * TIME * (TIME + 1) // 2
    share = ratio(timings["products"], timings["step"]) * (flops + pairs) / flops
    what = f"transformer, d={WIDTH}, B={ROWS} T={TIME}: model FLOP/s over those of its matrix products alone"
    details = seconds_of(timings) | {"products_gigaflops": flops / timings["products"].median / 1e9}
    return [Result(what, 100 * share, "%", "at least 70", share >= 0.7, details)]


def products(shapes: list[tuple[int, int]], tokens: int) -> Callable[[], list[jax.Array]]:
    """The products x W of all these weights and the two of each one's backward pass, and nothing else."""
    draws = [jax.random.split(key, 3) for key in jax.random.split(jax.random.key(0), len(shapes))]
    arrays = [
        (jax.random.normal(x, (tokens, a)), jax.random.normal(w, (a, b)), jax.random.normal(dy, (tokens, b)))
        for (x, w, dy), (a, b) in zip(draws, shapes, strict=True)
    ]

    @jax.jit
    def run(arrays: list[tuple[jax.Array, ...]]) -> list[jax.Array]:
        done = [product for x, w, dy in arrays for product in (x @ w, dy @ w.T, x.T @ dy)]
        return [jnp.sum(product, axis=0) for product in done]  # a small result; XLA makes the whole product first

    return partial(run, arrays)
