"""The depthwise causal convolution by gathering every token's window: the definition for the other backends."""

import jax
import jax.numpy as jnp

from lcx_kernels.causal_conv.taps import last_tokens


def convolve(
    silu: bool, x: jax.Array, tail: jax.Array, weight: jax.Array, bias: jax.Array, lookback: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """x [batch, time, channels]; tail [batch, width - 1, channels]; weight [channels, width]; bias [channels]; lookback
    [batch, time]. Weight and bias have the dtype of the arithmetic.

    Returns y [batch, time, channels] in the dtype of x, and the next tail in the dtype of ``tail``.
    """
    width, time = weight.shape[1], x.shape[1]
    tokens = jnp.concatenate([tail.astype(weight.dtype), x.astype(weight.dtype)], axis=1)
    tap = jnp.arange(width, dtype=jnp.int32)
    windows = tokens[:, jnp.arange(time, dtype=jnp.int32)[:, None] + tap]  # [batch, time, width, channels]
    if lookback is not None:
        visible = width - 1 - tap <= lookback[:, :, None]
        windows = jnp.where(visible[..., None], windows, jnp.zeros_like(windows))
    y = bias + jnp.einsum("btwc,cw->btc", windows, weight, precision=jax.lax.Precision.HIGHEST)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype), last_tokens(x, tail)
