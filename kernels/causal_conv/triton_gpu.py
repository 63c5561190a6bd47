"""The convolution for NVIDIA GPUs, in Triton through jax-triton: what JAX sees of it.

XLA writes out the joined tokens forward, and backward what it shifts; these kernels read and write every token once.
To import this, no Triton is needed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.causal_conv.taps import add_last, last_tokens
from lcx_kernels.triton_launch import call
from lcx_kernels.triton_launch import missing as missing
from lcx_kernels.varying import vary_as

_WARPS = 4
_PER_THREAD = 2  # channels
LENGTH = 128  # tokens of a segment
GROUP = 8  # tokens that are read at a time


class Launch(NamedTuple):
    """One kernel launch. The kernel's parameters are inputs, scalars and outputs, in this order, then the constants."""

    kernel: str
    programs: int
    warps: int
    inputs: tuple[Any, ...]
    scalars: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], Any], ...]  # shape and dtype of each
    constants: dict[str, int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(silu, x, tail, weight, bias, lookback) -> tuple[jax.Array, jax.Array]:
    """The convolution; see `reference.convolve`."""
    (y,) = run(_launch("forward", silu, x, tail, weight, bias, lookback, (), ((x.shape, x.dtype),)))
    return y, last_tokens(x, tail)


def _forward(silu, *arrays):
    return convolve(silu, *arrays), arrays


def _backward(silu, residuals, cotangents):
    x, tail, weight, bias, _ = residuals
    dy, d_last = cotangents
    (batch, time, channels), width = x.shape, weight.shape[1]
    d_tail = tail.shape if width > 1 else (1,)
    sums = (batch, -(-time // LENGTH), width + 1, channels)
    outputs = ((x.shape, x.dtype), (d_tail, weight.dtype), (sums, weight.dtype))
    dx, d_tail, sums = run(_launch("backward", silu, *residuals, (dy,), outputs))
    sums = sums.sum(axis=(0, 1))
    d_tail = d_tail.astype(tail.dtype) if width > 1 else jnp.zeros_like(tail)
    dx, d_tail = add_last(dx, d_tail, d_last)
    return dx, d_tail, sums[:width].T, sums[width].astype(bias.dtype), None


convolve.defvjp(_forward, _backward)


def _launch(kernel, silu, x, tail, weight, bias, lookback, more, outputs) -> Launch:
    (batch, time, channels), width = x.shape, weight.shape[1]
    segments, block = -(-time // LENGTH), 32 * _WARPS * _PER_THREAD
    programs = batch * segments * -(-channels // block)
    if programs >= 2**31:
        raise ValueError(f"x: shape {x.shape} needs {programs} programs, more than a grid has")
    # Pointers to what is absent are not touched.
    arrays = (x, tail if width > 1 else x, weight.T, bias, x if lookback is None else lookback.astype(jnp.int32), *more)
    constants = {"SILU": silu, "LIMITED": lookback is not None, "CHANNELS": channels, "WIDTH": width}
    constants |= {"BLOCK": block, "LENGTH": LENGTH, "GROUP": GROUP}
    return Launch(kernel, programs, _WARPS, arrays, (time, segments), outputs, constants)


def run(launch: Launch) -> tuple[jax.Array, ...]:
    """The outputs of a launch, varying over mesh axes as its inputs do."""
    return vary_as(launch.inputs, _call(launch))


_call = functools.partial(call, "lcx_kernels.causal_conv.triton_kernels")
