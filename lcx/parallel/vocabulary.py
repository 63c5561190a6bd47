"""A softmax over a vocabulary that devices share: what one device knows of its part becomes what is true of all.

For functions that `Shard.kernel` calls. `axis` is what cuts the vocabulary (`vocabulary_axis`); None: nothing does.
"""

import jax
import jax.numpy as jnp

from lcx.parallel.sequence import MeshAxis
from lcx.parallel.sharding import ambient_mesh, divisible_spec


def vocabulary_axis(vocab_size: int) -> MeshAxis | None:
    """The axis of the ambient mesh that cuts a vocabulary of this size."""
    mesh = ambient_mesh()
    return None if mesh is None else divisible_spec((vocab_size,), ("vocab",), mesh)[0]


def log_sum_exp(scores: jax.Array, axis: MeshAxis | None) -> jax.Array:
    """log(sum(exp(scores))) over the whole vocabulary, of scores [..., the device's part of it]: [...]."""
    if axis is None:
        return jax.nn.logsumexp(scores, axis=-1)
    maximum = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(scores, axis=-1)), axis)
    return maximum + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(scores - maximum[..., None]), axis=-1), axis))


def pick(scores: jax.Array, tokens: jax.Array, axis: MeshAxis | None) -> jax.Array:
    """The scores [..., part] of tokens [...], whosever part they are in: [...]."""
    if axis is None:
        return jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]
    size = scores.shape[-1]
    place = tokens - jax.lax.axis_index(axis) * size
    here = jnp.take_along_axis(scores, jnp.clip(place, 0, size - 1)[..., None], axis=-1)[..., 0]
    return jax.lax.psum(jnp.where((place >= 0) & (place < size), here, 0), axis)
