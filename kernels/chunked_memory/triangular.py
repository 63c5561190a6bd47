"""Inverses of unit lower triangular matrices, from products of small ones: many at once, on any platform."""

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.state import PRECISION

BASE = 4  # rows of the blocks that are inverted row by row


@jax.custom_vjp
def inverse(strict: jax.Array) -> jax.Array:
    """(I + strict)^-1 for strictly lower triangular matrices [..., C, C], C a power of two.

    By forward substitution in small blocks on the diagonal, which are then joined two by two,

        [ L  0 ]^-1   [   L^-1            0    ]
        [ X  R ]    = [ -R^-1 X L^-1    R^-1   ]

    Entry [t, s] depends only on rows and columns from s to t.
    """
    size = strict.shape[-1]
    h = min(BASE, size)
    diagonal = _blocks(strict, h, 0)
    unit = jnp.eye(h, dtype=strict.dtype)
    rows = []
    for t in range(h):
        row = jnp.broadcast_to(unit[t], (*diagonal.shape[:-2], h))
        for s in range(t):
            row = row - diagonal[..., t, s, None] * rows[s]
        rows.append(row)
    found = jnp.stack(rows, axis=-2)  # [..., blocks, h, h]
    while h < size:
        pairs = found.reshape(*found.shape[:-3], -1, 2, h, h)
        left, right = pairs[..., 0, :, :], pairs[..., 1, :, :]
        cross = -_product(_product(right, _blocks(strict, 2 * h, h)), left)
        top = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
        found = jnp.concatenate([top, jnp.concatenate([cross, right], axis=-1)], axis=-2)
        h *= 2
    return found[..., 0, :, :]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=PRECISION)


def _blocks(matrix: jax.Array, stride: int, below: int) -> jax.Array:
    """Blocks [..., size / stride, h, h] on the diagonal, where ``below`` is 0, or from its lower left quarters."""
    count = matrix.shape[-1] // stride
    blocks = matrix.reshape(*matrix.shape[:-2], count, stride, count, stride)
    on_diagonal = jnp.eye(count, dtype=bool)[:, None, :, None]
    found = jnp.sum(jnp.where(on_diagonal, blocks, 0), axis=-2)
    return found[..., below:, : below or stride]


def _forward(strict: jax.Array):
    found = inverse(strict)
    return found, found


def _backward(found: jax.Array, gradient: jax.Array):
    transposed = jnp.swapaxes(found, -1, -2)
    return (jnp.tril(-_product(_product(transposed, gradient), transposed), -1),)


inverse.defvjp(_forward, _backward)
