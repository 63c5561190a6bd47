"""Ten minutes on one accelerator: kernels and a whole step beside what is installed there, the GPU tests, a profile.

    python scripts/benchmark.py hardware --out=REPORT

Written for an H100. Peers that are not installed (mamba_ssm, flash-linear-attention) are left out. On a CPU the same
code runs at sizes that take seconds, which says that it works and nothing else.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lcx.benchmarks import peers
from lcx.benchmarks.harness import Result, seconds_of, take_turns
from lcx.benchmarks.models import stepper
from lcx.config import Config
from lcx.planning.accounting import flops_per_token
from lcx.planning.hardware import peak_flops
from lcx.training.trainer import make_program
from lcx_kernels.attention import attention
from lcx_kernels.chunked_memory import chunked_memory
from lcx_kernels.selective_scan import selective_scan

TESTS = ["-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", "tests/kernels"]
TEST_SECONDS = 240  # after which the GPU tests are ended


@dataclass(frozen=True)
class Sizes:
    """What is measured on a platform."""

    batch: int
    time: int
    channels: int  # of the selective scan; 16 states each
    heads: int  # of SSD and attention
    width: int  # of a head of both
    state: int  # of SSD
    dtype: Any
    tests: bool  # whether the tests of the kernels are run


SIZES = {
    "gpu": Sizes(8, 4096, 1536, 24, 64, 128, jnp.bfloat16, True),
    "cpu": Sizes(1, 128, 64, 2, 16, 16, jnp.float32, False),
}


def hardware_results(config: Config, profile: str | None, rounds: int) -> list[Result]:
    """Everything, the most important first.

    Args:
      config: of the whole step, SAMBA 421M where there is an accelerator.
      profile: a folder for a profile of three steps, or None for none.
      rounds: turns of each contestant.
    """
    sizes = SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    results = step_results(config, profile, rounds)
    for part in (scan_results, ssd_results, attention_results):
        results += part(sizes, rounds)
    return results + (test_results() if sizes.tests else [])


def step_results(config: Config, profile: str | None, rounds: int) -> list[Result]:
    """Tokens/s and MFU of a whole training step, beside flash-linear-attention's model of the same shape."""
    train, model = config.train, config.model
    tokens = train.batch_size * train.sequence_length
    step = stepper(make_program(config))
    contestants: dict[str, Callable] = {"ours": step}
    if jax.default_backend() == "gpu" and peers.available("torch", "fla"):
        contestants["fla"] = peers.fla_samba_step(config)
    timings = take_turns(contestants, rounds)
    name = f"{model.family} train step, d={model.d_model}, B={train.batch_size} T={train.sequence_length:,}"
    results = [
        Result(f"{name}: {who}", tokens / timing.median, "tokens/s", details=seconds_of({who: timing}))
        for who, timing in timings.items()
    ]
    forward, peak = flops_per_token(model, train.sequence_length), peak_flops(jax.devices()[0].device_kind, "bfloat16")
    if forward and peak:
        mfu = 3 * forward * tokens / timings["ours"].median / peak / jax.device_count()
        results.append(Result("the same: model FLOPs utilisation", 100 * mfu, "%"))
    if profile is not None:
        with jax.profiler.trace(profile):
            for _ in range(3):
                jax.block_until_ready(step())
    return results


def both_passes(function: Callable, arguments: Mapping[str, jax.Array]) -> dict[str, Callable]:
    """Compiled calls of a function of named arrays: forward, and forward with backward."""

    def pull(arguments: dict) -> Any:
        out, transpose = jax.vjp(lambda given: function(**given), arguments)
        return out, transpose(jnp.ones_like(out))

    forward = jax.jit(lambda arguments: function(**arguments))
    return {"forward": partial(forward, dict(arguments)), "both": partial(jax.jit(pull), dict(arguments))}


def compare(what: str, ours: dict[str, Callable], theirs: dict[str, dict[str, Callable]], rounds: int) -> list[Result]:
    """Milliseconds of each, forward and both passes."""
    contestants = {f"ours {kind}": call for kind, call in ours.items()}
    contestants |= {f"{who} {kind}": call for who, calls in theirs.items() for kind, call in calls.items()}
    timings = take_turns(contestants, rounds)
    return [Result(f"{what}: {name}", 1e3 * timing.median, "ms") for name, timing in timings.items()]


def draw(shape: tuple[int, ...], dtype: Any, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Uniform values."""
    return jax.random.uniform(jax.random.key(math.prod(shape)), shape, jnp.float32, low, high).astype(dtype)


def scan_results(sizes: Sizes, rounds: int) -> list[Result]:
    """The selective scan beside mamba_ssm's."""
    tokens, state = (sizes.batch, sizes.time), 16
    arguments = {
        "x": draw((*tokens, sizes.channels), sizes.dtype),
        "dt": draw((*tokens, sizes.channels), sizes.dtype, 1e-3, 1e-1),
        "A": -jnp.broadcast_to(jnp.arange(1.0, state + 1), (sizes.channels, state)),
        "B": draw((*tokens, state), sizes.dtype),
        "C": draw((*tokens, state), sizes.dtype),
    }
    theirs = {}
    if jax.default_backend() == "gpu" and peers.available("torch", "mamba_ssm"):
        theirs["mamba_ssm"] = peers.mamba_ssm_scan(arguments)
    what = f"selective scan, B={sizes.batch} T={sizes.time} D={sizes.channels} N={state}"
    ours = both_passes(lambda **given: selective_scan(**given)[0], arguments)
    return compare(what, ours, theirs, rounds)


def ssd_results(sizes: Sizes, rounds: int) -> list[Result]:
    """Mamba-2's state-space dual beside mamba_ssm's Triton."""
    tokens = (sizes.batch, sizes.time)
    arguments = {
        "q": draw((*tokens, 1, sizes.state), sizes.dtype),
        "k": draw((*tokens, 1, sizes.state), sizes.dtype),
        "v": draw((*tokens, sizes.heads, sizes.width), sizes.dtype),
        "log_decay": draw((*tokens, sizes.heads), jnp.float32, -0.5, -0.01),
    }
    theirs = {}
    if jax.default_backend() == "gpu" and peers.available("torch", "mamba_ssm"):
        theirs["mamba_ssm"] = peers.mamba_ssm_ssd(arguments)
    chunk = min(256, sizes.time)
    what = f"SSD, B={sizes.batch} T={sizes.time} H={sizes.heads} P={sizes.width} N={sizes.state}"
    ours = both_passes(lambda **given: chunked_memory(**given, chunk_size=chunk)[0], arguments)
    return compare(what, ours, theirs, rounds)


def attention_results(sizes: Sizes, rounds: int) -> list[Result]:
    """Attention's choice beside cuDNN's by way of jax.nn, without a window and with one."""
    shape = (sizes.batch, sizes.time, sizes.heads, sizes.width)
    arguments = {name: draw(shape, sizes.dtype) for name in ("q", "k", "v")}
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    results = []
    for window in (None, sizes.time // 4):
        local = None if window is None else (window - 1, 0)

        def theirs(q: jax.Array, k: jax.Array, v: jax.Array, local: tuple | None = local) -> jax.Array:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=local, implementation=implementation
            )

        ours = both_passes(lambda window=window, **given: attention(**given, window=window)[0], arguments)
        what = f"attention, B={sizes.batch} T={sizes.time} H={sizes.heads} K={sizes.width} window={window}"
        results += compare(what, ours, {implementation: both_passes(theirs, arguments)}, rounds)
    return results


def test_results() -> list[Result]:
    """The tests of the kernels on this accelerator: how many passed, and how many failed."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *TESTS],
            cwd=root, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS,
        )  # fmt: skip
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() + " (ended: out of time)"
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed)", output)}
    last = output.strip().splitlines()[-1:] or ["nothing was printed"]
    passed, failed = counts.get("passed", 0), counts.get("failed", 0)
    details = {"summary": last[0]}
    return [Result("GPU tests that passed", passed, "tests", "none failed", bool(passed and not failed), details)]
