"""Root-mean-square normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.initializers import Constant
from lcx.params import param


def normalize(x: jax.Array, eps: float, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over one axis or several; at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale, over the last axis (Zhang and Sennrich, arXiv 1910.07467, eq. 4).

    Statistics are at least float32; the result is cast to the input's dtype before the scale is applied, the order of
    Hugging Face's Llama.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        rngs: nnx.Rngs,
        *,
        axis: str | None = None,
        dtype: Any = jnp.float32,
        multiplier: float = 1.0,
    ):
        """multiplier: of the output, which the scale starts as and learns in proportion to."""
        self.eps = eps
        init = Constant(multiplier)
        self.scale = param(rngs, (width,), (axis,), init, dtype=dtype, decay=False, learning_rate=multiplier)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., width]; returns the same shape and dtype."""
        return normalize(x, self.eps).astype(x.dtype) * self.scale[...].astype(x.dtype)
