"""What decays leave between two tokens of a chunk: exponentials of sums over exactly the tokens between them.

The sums are built by doubling. In a block of h tokens known are the sums from its head up to each token, from each
token to its end, and between any two of its tokens. For two neighbouring blocks these three join: from s in the left
block to t in the right one it is all after s in the left, and all up to t in the right. So nothing is ever subtracted,
and with log-decays that are not positive no exponent is above 0.
"""

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.state import PRECISION


def sums_up_to(x: jax.Array, axis: int) -> jax.Array:
    """The sum of x over the tokens up to each, itself included."""
    return jax.lax.cumsum(x, axis=axis)


def sums_after(x: jax.Array, axis: int) -> jax.Array:
    """The sum of x over the tokens after each, itself left out."""
    later = jax.lax.slice_in_dim(x, 1, None, axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, 1)
    return jnp.pad(jax.lax.cumsum(later, axis=axis, reverse=True), padding)


def sums_between(log_decay: jax.Array) -> jax.Array:
    """[..., C] to [..., C, C]: [t, s] is the sum over s < r <= t, 0 on the diagonal and above; C a power of two."""
    upto = log_decay[..., None]  # [..., blocks, h]
    after = jnp.zeros_like(upto)
    between = jnp.zeros_like(upto)[..., None]  # [..., blocks, h, h]
    while upto.shape[-2] > 1:
        (left_upto, right_upto), (left_after, right_after) = _pairs(upto, -2), _pairs(after, -2)
        cross = right_upto[..., :, None] + left_after[..., None, :]
        between = _join(between, cross)
        upto, after = _joined_sums(left_upto, right_upto, left_after, right_after, axis=-1)
    return between[..., 0, :, :]


def decayed_products(x: jax.Array, y: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Products of tokens whose every channel decays by itself.

    Args: x [..., i, C, K], several lots of tokens; y and log_decay [..., C, K]; C a power of two.
    Returns: [..., i, C, C]: [t, s] is the sum over K of x[t] y[s] exp(sum of log_decay over s < r <= t); 0 above the
      diagonal.
    """
    size, width = y.shape[-2:]
    upto = log_decay[..., None, :]  # [..., blocks, h, K]
    after = jnp.zeros_like(upto)
    products = jnp.sum(x * y[..., None, :, :], axis=-1)[..., None, None]  # [..., i, blocks, h, h]
    h = 1
    while h < size:
        (left_upto, right_upto), (left_after, right_after) = _pairs(upto, -3), _pairs(after, -3)
        late = x.reshape(*x.shape[:-2], -1, 2, h, width)[..., 1, :, :] * jnp.exp(right_upto)[..., None, :, :, :]
        early = y.reshape(*y.shape[:-2], -1, 2, h, width)[..., 0, :, :] * jnp.exp(left_after)
        cross = jnp.einsum("...inhk,...nsk->...inhs", late, early, precision=PRECISION)
        products = _join(products, cross)
        upto, after = _joined_sums(left_upto, right_upto, left_after, right_after, axis=-2)
        h *= 2
    return products[..., 0, :, :]


def _pairs(blocks: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The left and the right ones of neighbouring blocks."""
    axis = blocks.ndim + axis
    paired = blocks.reshape(*blocks.shape[:axis], -1, 2, *blocks.shape[axis + 1 :])
    return jax.lax.index_in_dim(paired, 0, axis + 1, False), jax.lax.index_in_dim(paired, 1, axis + 1, False)


def _join(squares: jax.Array, cross: jax.Array) -> jax.Array:
    """Squares [..., blocks, h, h] and what stands below between neighbours, [..., blocks / 2, h, h]."""
    left, right = _pairs(squares, -3)
    top = jnp.concatenate([left, jnp.zeros_like(cross)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([cross, right], axis=-1)], axis=-2)


def _joined_sums(left_upto, right_upto, left_after, right_after, axis: int) -> tuple[jax.Array, jax.Array]:
    left_total = jax.lax.slice_in_dim(left_upto, left_upto.shape[axis] - 1, None, axis=axis)
    right_total = jax.lax.slice_in_dim(right_upto, right_upto.shape[axis] - 1, None, axis=axis)
    upto = jnp.concatenate([left_upto, left_total + right_upto], axis=axis)
    return upto, jnp.concatenate([left_after + right_total, right_after], axis=axis)
