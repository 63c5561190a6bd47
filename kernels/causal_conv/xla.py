"""The depthwise causal convolution as a sum of shifted copies, which XLA fuses into one loop; the default on CPU.

The backward pass is written by hand, so that what is shifted stays in the caller's dtype in memory and is widened
inside the loops: what is joined or padded along time is written out before it is read.
"""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels.causal_conv.taps import add_last, last_tokens, select, taps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    silu: bool, x: jax.Array, tail: jax.Array, weight: jax.Array, bias: jax.Array, lookback: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The convolution; see `reference.convolve`."""
    return forward(silu, x, tail, weight, bias, lookback), last_tokens(x, tail)


def forward(silu, x, tail, weight, bias, lookback) -> jax.Array:
    """y alone."""
    y = _sums(_join(x, tail), weight, bias, lookback)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def _join(x: jax.Array, tail: jax.Array) -> jax.Array:
    dtype = jnp.result_type(x, tail)
    return jnp.concatenate([tail.astype(dtype), x.astype(dtype)], axis=1)


def _sums(tokens, weight, bias, lookback) -> jax.Array:
    width = weight.shape[1]
    time = tokens.shape[1] - (width - 1)
    y = bias
    for distance, tap in taps(width):
        y = y + weight[:, tap] * select(distance, lookback, tokens[:, tap : tap + time].astype(weight.dtype))
    return y


def _forward(silu, x, tail, weight, bias, lookback):
    return convolve(silu, x, tail, weight, bias, lookback), (x, tail, weight, bias, lookback)


def _backward(silu, residuals, cotangents):
    x, tail, weight, bias, lookback = residuals
    dy, d_last = cotangents
    dtype, width, time = weight.dtype, weight.shape[1], x.shape[1]
    tokens = _join(x, tail)
    if silu:  # what is shifted is written out: in the caller's dtype
        y = _sums(tokens, weight, bias, lookback)
        gate = jax.nn.sigmoid(y)
        dy = (dy.astype(dtype) * (gate * (1 + y * (1 - gate)))).astype(x.dtype)
    d_weight = []
    for distance, tap in taps(width):
        seen = select(distance, lookback, tokens[:, tap : tap + time].astype(dtype))
        d_weight.insert(0, jnp.sum(dy.astype(dtype) * seen, axis=(0, 1)))
    d_bias = jnp.sum(dy.astype(dtype), axis=(0, 1)).astype(bias.dtype)
    held = width - 1
    dx = _of_seen(dy, weight, lookback, 0, time).astype(x.dtype)
    head = slice(min(held, time))
    d_tail = _of_seen(dy[:, head], weight, None if lookback is None else lookback[:, head], held, held)
    dx, d_tail = add_last(dx, d_tail.astype(tail.dtype), d_last)
    return dx, d_tail, jnp.stack(d_weight, axis=1), d_bias, None


def _of_seen(dy, weight, lookback, before: int, count: int) -> jax.Array:
    """Gradients of ``count`` tokens from ``before`` tokens ahead of dy's first on, by all readers that dy has."""
    width, time = weight.shape[1], dy.shape[1]
    edges = (before, max(0, count + width - 1 - before - time))  # so that every token has a reader at every distance
    readers = jnp.pad(dy, ((0, 0), edges, (0, 0)))
    limits = None if lookback is None else jnp.pad(lookback, ((0, 0), edges))
    total = jnp.zeros((), weight.dtype)
    for distance, tap in taps(width):
        now = slice(distance, distance + count)
        allowed = None if limits is None else limits[:, now]
        total = total + weight[:, tap] * select(distance, allowed, readers[:, now].astype(weight.dtype))
    return total


convolve.defvjp(_forward, _backward)
