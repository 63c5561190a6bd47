"""The depthwise causal convolution as a sum of shifted copies, which XLA fuses into one loop; the default on CPU."""

import jax
import jax.numpy as jnp


def convolve(tokens: jax.Array, weight: jax.Array, lookback: jax.Array | None) -> jax.Array:
    """tokens [batch, width - 1 + time, channels], weight [channels, width], lookback int [batch, time] or None.

    Returns [batch, time, channels].
    """
    width = weight.shape[1]
    time = tokens.shape[1] - (width - 1)
    y = weight[:, -1] * tokens[:, width - 1 :]
    for distance in range(1, width):
        tap = width - 1 - distance
        seen = tokens[:, tap : tap + time]
        if lookback is not None:
            seen = jnp.where((distance <= lookback)[:, :, None], seen, jnp.zeros_like(seen))
        y = y + weight[:, tap] * seen
    return y
