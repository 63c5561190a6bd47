"""The kernels beside what a user of JAX would write instead."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lcx.benchmarks.harness import Result, ratio, seconds_of, take_turns, temporaries
from lcx_kernels.selective_scan import selective_scan

CHANNELS, STATE = 512, 16


def scan_shapes(batch: int, time: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of Mamba's scan, float32."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    tokens, shared = shape(batch, time, CHANNELS), shape(batch, time, STATE)
    return {"x": tokens, "dt": tokens, "A": shape(CHANNELS, STATE), "B": shared, "C": shared}


def scan_arguments(batch: int, time: int, channels: int = CHANNELS) -> dict[str, jax.Array]:
    """Values of these, with steps as Mamba has them at the start."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "x": draw(batch, time, channels),
        "dt": jnp.asarray(random.uniform(1e-3, 1e-1, (batch, time, channels)), jnp.float32),
        "A": -jnp.broadcast_to(jnp.arange(1.0, STATE + 1), (channels, STATE)),
        "B": draw(batch, time, STATE),
        "C": draw(batch, time, STATE),
    }


def associative(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
    """The same recurrence by jax.lax.associative_scan over [batch, time, channels, state]."""
    decay = jnp.exp(dt[..., None] * A)
    written = (dt * x)[..., None] * B[:, :, None]
    compose = lambda early, late: (late[0] * early[0], late[0] * early[1] + late[1])  # noqa: E731
    _, h = jax.lax.associative_scan(compose, (decay, written), axis=1)
    return jnp.einsum("btdn,btn->btd", h, C)


def _gradient(function):
    return jax.jit(jax.grad(lambda arguments: jnp.sum(jnp.sin(function(**arguments)))))


def scan_results(rounds: int) -> list[Result]:
    """The selective scan, forward and backward."""
    ours = _gradient(lambda **arguments: selective_scan(**arguments)[0])
    theirs = _gradient(associative)
    small, long, wide = scan_arguments(2, 1024), scan_arguments(1, 16_384), scan_arguments(8, 2048)
    timings = take_turns({"ours": partial(ours, small), "associative": partial(theirs, small)}, rounds)
    odd = scan_arguments(1, 16_384, CHANNELS - 1)
    contestants = {"long": partial(ours, long), "odd": partial(ours, odd), "wide": partial(ours, wide)}
    lengths = take_turns(contestants, max(3, rounds // 3))
    speedup = ratio(timings["associative"], timings["ours"])
    long_share = ratio(lengths["wide"], lengths["long"])
    memory = temporaries(ours, small) / temporaries(theirs, small)
    per_token = [temporaries(ours, scan_shapes(1, time)) / time for time in (1024, 65_536)]
    rate = lambda timing, tokens: f"{tokens / timing.median:,.0f} tokens/s"  # noqa: E731
    return [
        Result(
            "selective scan, B=2 T=1024, over associative_scan: throughput",
            speedup,
            "x",
            "at least 3.5",
            speedup >= 3.5,
            seconds_of(timings) | {"ours": rate(timings["ours"], 2048)},
        ),
        Result("the same: temporaries", memory, "x", "below 1/20", memory < 1 / 20),
        Result(
            "selective scan, B=1 T=16,384 over B=8 T=2048: throughput",
            long_share,
            "x",
            "at least 0.65",
            long_share >= 0.65,
            seconds_of(lengths) | {name: rate(timing, 16_384) for name, timing in lengths.items()},
        ),
        Result(
            "the same with 511 channels for B=1",
            ratio(lengths["wide"], lengths["odd"]),
            "x",
            "at least 0.65",
            ratio(lengths["wide"], lengths["odd"]) >= 0.65,
        ),
        Result(
            "selective scan, B=1: temporaries a token at T=65,536 over those at T=1024",
            per_token[1] / per_token[0],
            "x",
            "about 1",
            0.8 < per_token[1] / per_token[0] < 1.2,
            {"bytes_a_token": per_token},
        ),
    ]
