"""Attention beside what a user of JAX, and one of PyTorch, would write instead; on a GPU, its backends side by side."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.benchmarks.harness import Result, ratio, seconds_of, take_turns, temporaries
from lcx_kernels.attention import attention

HEADS, WIDTH = 4, 64
WINDOW, SHORT, LONG = 256, 4096, 16_384


def attention_results(rounds: int) -> list[Result]:
    """Forward and backward passes; lengths and contestants are those of the platform."""
    return gpu_results(rounds) if jax.default_backend() == "gpu" else cpu_results(rounds)


def draw(batch: int, time: int, heads: int, width: int, dtype: Any = jnp.float32, kv_heads: int | None = None) -> list:
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(0)
    counts = heads, kv_heads or heads, kv_heads or heads, heads
    return [jnp.asarray(rng.standard_normal((batch, time, n, width)), dtype) for n in counts]


def gradient(function: Callable) -> Callable:
    """From q, k, v and a cotangent to the output and the gradients."""

    def both(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(d_out)

    return jax.jit(both)


def ours(**options: Any) -> Callable:
    """The gradient of this package's attention."""
    return gradient(lambda q, k, v: attention(q, k, v, **options)[0])


def cpu_results(rounds: int) -> list[Result]:
    """B=2 T=1024 H=4 K=64 in float32, and a window of 256 at two lengths."""
    arrays = draw(2, 1024, HEADS, WIDTH)
    theirs = gradient(partial(jax.nn.dot_product_attention, is_causal=True))
    contestants = {"ours": partial(ours(), *arrays), "jax.nn": partial(theirs, *arrays)}
    torch_call = torch_attention(arrays)
    if torch_call is not None:
        contestants["torch"] = torch_call
    timings = take_turns(contestants, rounds)
    speedup = ratio(timings["jax.nn"], timings["ours"])
    shape = f"attention, B=2 T=1024 H={HEADS} K={WIDTH} float32, forward and backward"
    results = [
        Result(f"{shape}, over jax.nn: throughput", speedup, "x", "at least 3", bool(speedup >= 3), seconds_of(timings))
    ]
    if torch_call is not None:
        times = ratio(timings["ours"], timings["torch"])
        results.append(Result("the same: time over that of PyTorch's SDPA", times, "x", "aim: 1.5"))
    return results + window_results(rounds)


def window_results(rounds: int) -> list[Result]:
    """How time and temporaries of a window grow with T, on a CPU."""
    function = ours(window=WINDOW)
    lengths = {f"T={time}": partial(function, *draw(1, time, HEADS, WIDTH)) for time in (SHORT, LONG)}
    timings = take_turns(lengths, rounds)
    growth = ratio(timings[f"T={LONG}"], timings[f"T={SHORT}"])
    name = f"attention, B=1 H={HEADS} K={WIDTH} window {WINDOW}: time at T={LONG:,} over T={SHORT:,}"
    results = [Result(name, growth, "x", "at most 5.2", bool(growth <= 5.2), seconds_of(timings))]
    for window in (None, WINDOW):
        used = []
        for time in (SHORT, LONG):
            shapes = [jax.ShapeDtypeStruct((1, time, HEADS, WIDTH), jnp.float32)] * 4
            used.append(temporaries(ours(window=window), *shapes))
        grown = used[1] / used[0]
        name = f"attention, {'no window' if window is None else f'window {window}'}: temporaries, likewise"
        results.append(Result(name, grown, "x", "about 4", bool(grown <= 4.4), {"bytes": used}))
    return results


def torch_attention(arrays: list) -> Callable | None:
    """PyTorch's own attention on the same values, forward and backward; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    q, k, v, d_out = (torch.from_numpy(np.asarray(array)).transpose(1, 2).contiguous() for array in arrays)

    def call():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        return torch.autograd.grad(out, leaves, d_out)

    return call


def gpu_results(rounds: int) -> list[Result]:
    """The backends in bfloat16, 16 query and 4 key heads, in TFLOP/s of the pairs that see each other."""
    results = []
    for width in (64, 128):
        for time, window, documents in ((4096, None, 0), (16_384, 2048, 0), (8192, None, 8)):
            batch = 65_536 // time
            arrays = draw(batch, time, 16, width, jnp.bfloat16, kv_heads=4)
            reach = min(window or time, time // max(documents, 1))
            length = time // max(documents, 1)
            pairs = batch * 16 * max(documents, 1) * (reach * (reach + 1) // 2 + (length - reach) * reach)
            options: dict[str, Any] = {"window": window}
            if documents:
                numbers = np.arange(time, dtype=np.int32) // length
                options["segment_ids"] = jnp.broadcast_to(jnp.asarray(numbers), (batch, time))
            backends = ["triton"] if documents else ["triton", "cudnn"]
            calls = {f"{name} both": partial(ours(backend=name, **options), *arrays) for name in backends}
            for name in backends:
                forward = jax.jit(lambda q, k, v, name=name, o=options: attention(q, k, v, backend=name, **o)[0])
                calls[f"{name} forward"] = partial(forward, *arrays[:3])
            timings = take_turns(calls, rounds)
            for name, timing in timings.items():
                flops = 4 * width * pairs * (3.5 if name.endswith("both") else 1)
                case = f"K={width} B={batch} T={time:,}" + (f" window {window}" if window else "")
                case += f" {documents} documents" if documents else ""
                speed = flops / timing.median / 1e12
                results.append(Result(f"attention by {name}, {case}", speed, "TFLOP/s", details=seconds_of(timings)))
    return results
