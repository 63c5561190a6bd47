"""The depthwise causal convolution by gathering every token's window: the definition for the other backends."""

import jax
import jax.numpy as jnp


def convolve(tokens: jax.Array, weight: jax.Array, bias: jax.Array, lookback: jax.Array | None) -> jax.Array:
    """tokens [batch, width - 1 + time, channels]; weight [channels, width]; bias [channels]; lookback [batch, time].

    Returns [batch, time, channels] in the dtype of tokens.
    """
    width = weight.shape[1]
    time = tokens.shape[1] - (width - 1)
    tap = jnp.arange(width, dtype=jnp.int32)
    windows = tokens.astype(weight.dtype)[
        :, jnp.arange(time, dtype=jnp.int32)[:, None] + tap
    ]  # [batch, time, width, channels]
    if lookback is not None:
        visible = width - 1 - tap <= lookback[:, :, None]
        windows = jnp.where(visible[..., None], windows, jnp.zeros_like(windows))
    y = bias + jnp.einsum("btwc,cw->btc", windows, weight, precision=jax.lax.Precision.HIGHEST)
    return y.astype(tokens.dtype)
