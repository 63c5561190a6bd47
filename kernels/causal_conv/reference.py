"""The depthwise causal convolution by gathering every token's window: the definition for the other backends."""

import jax
import jax.numpy as jnp


def convolve(tokens: jax.Array, weight: jax.Array, lookback: jax.Array | None) -> jax.Array:
    """tokens [batch, width - 1 + time, channels], weight [channels, width], lookback int [batch, time] or None.

    Returns [batch, time, channels].
    """
    width = weight.shape[1]
    time = tokens.shape[1] - (width - 1)
    tap = jnp.arange(width, dtype=jnp.int32)
    windows = tokens[:, jnp.arange(time, dtype=jnp.int32)[:, None] + tap]  # [batch, time, width, channels]
    if lookback is not None:
        visible = width - 1 - tap <= lookback[:, :, None]
        windows = jnp.where(visible[..., None], windows, jnp.zeros_like(windows))
    return jnp.einsum("btwc,cw->btc", windows, weight, precision=jax.lax.Precision.HIGHEST)
