"""Rotary position embedding (RoPE)."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates the pairs (x[i], x[i + K/2]) by the angle position * base^(-2i/K): the half-split form.

    Su et al., arXiv 2104.09864, eq. 34, in the layout of Llama checkpoints. Angles are at least float32.

    Args:
      x: [batch, time, heads, K], K even.
      positions: int32 [batch, time].
      base: the base of the frequencies.

    Returns: the same shape and dtype as x.
    """
    width = x.shape[-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = positions[..., None, None].astype(dtype) * frequencies  # [batch, time, 1, K/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
