"""The inverse of a unit lower triangular matrix, in Pallas kernels for TPU."""

import jax
import jax.numpy as jnp
import numpy as np

from lcx_kernels.chunked_memory.pallas_tiles import dot, places, where

_BLOCK = 16  # rows that are solved one after another, in all blocks of the diagonal at once


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(1 + lower)^-1 for a strictly lower triangular [n, n], n a multiple of 16, finite.

    By forward substitution, first within blocks of the diagonal, then of blocks twice as large from their halves:
    [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]. Products of powers of `lower` would take fewer steps, and
    their terms grow beyond all bounds where keys repeat, only to cancel.
    """
    size = lower.shape[0]
    t, s = places(size)

    def block(index, length):
        return jax.lax.div(index, np.int32(length))

    inverse = jnp.where(t == s, jnp.ones_like(lower), jnp.zeros_like(lower))
    near = where(block(t, _BLOCK) == block(s, _BLOCK), lower)
    place = s - block(t, _BLOCK) * _BLOCK
    for j in range(min(_BLOCK, size) - 1):
        column = where(place == j, near).sum(axis=1, keepdims=True)
        row = inverse.reshape(size // _BLOCK, _BLOCK, size)[:, j : j + 1]
        row = jnp.broadcast_to(row, (size // _BLOCK, _BLOCK, size)).reshape(size, size)
        inverse = inverse - column * row
    length = _BLOCK
    while length < size:
        pair = block(t, 2 * length) == block(s, 2 * length)
        across = where(pair & (block(t, length) != block(s, length)), lower)
        inverse = inverse - dot(dot(inverse, across), inverse)
        length *= 2
    return inverse
