"""The depthwise causal convolution as a sum of shifted copies, which XLA fuses into one loop; the default everywhere.

The backward pass is written by hand, so that what is shifted stays in the caller's dtype in memory and is widened
inside the loops: what is joined or padded along time is written out before it is read.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def convolve(tokens: jax.Array, weight: jax.Array, bias: jax.Array, lookback: jax.Array | None) -> jax.Array:
    """The convolution; arithmetic is in weight's dtype.

    Args: tokens [batch, width - 1 + time, channels]; weight [channels, width]; bias [channels]; lookback int
    [batch, time] or None.

    Returns [batch, time, channels] in the dtype of tokens.
    """
    time = tokens.shape[1] - (weight.shape[1] - 1)
    y = bias
    for distance, tap in _taps(weight):
        seen = tokens[:, tap : tap + time].astype(weight.dtype)
        y = y + weight[:, tap] * _select(distance, lookback, seen)
    return y.astype(tokens.dtype)


def _taps(weight: jax.Array) -> list[tuple[int, int]]:
    """How far back each tap looks, and its column in the weights: the current token first."""
    width = weight.shape[1]
    return [(distance, width - 1 - distance) for distance in range(width)]


def _select(distance: int, lookback: jax.Array | None, values: jax.Array) -> jax.Array:
    """Values of the tokens that may look so far back, 0 of the others: by selection, so that not even a NaN passes."""
    if lookback is None or distance == 0:
        return values
    return jnp.where((distance <= lookback)[:, :, None], values, jnp.zeros_like(values))


def _forward(tokens, weight, bias, lookback):
    return convolve(tokens, weight, bias, lookback), (tokens, weight, bias, lookback)


def _backward(residuals, dy):
    tokens, weight, bias, lookback = residuals
    dtype, (held, time) = weight.dtype, (weight.shape[1] - 1, dy.shape[1])
    length = tokens.shape[1]
    padded = jnp.pad(dy, ((0, 0), (held, held), (0, 0)))  # so that every token has a reader at every distance
    readers = None if lookback is None else jnp.pad(lookback, ((0, 0), (held, held)))
    d_tokens, d_weight = jnp.zeros((), dtype), []
    for distance, tap in _taps(weight):
        reader = slice(distance, distance + length)
        allowed = None if readers is None else readers[:, reader]
        d_tokens = d_tokens + weight[:, tap] * _select(distance, allowed, padded[:, reader].astype(dtype))
        seen = _select(distance, lookback, tokens[:, tap : tap + time].astype(dtype))
        d_weight.insert(0, jnp.sum(dy.astype(dtype) * seen, axis=(0, 1)))
    d_bias = jnp.sum(dy.astype(dtype), axis=(0, 1)).astype(bias.dtype)
    return d_tokens.astype(tokens.dtype), jnp.stack(d_weight, axis=1), d_bias, None


convolve.defvjp(_forward, _backward)
