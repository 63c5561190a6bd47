"""What a local function may ask of the sequence that its shard is a part of.

Inside `parallel.kernels.Shard.kernel` a function sees one shard of every array. These operations connect it with the
shards before it in time. Here they stand for one shard, which is the whole sequence.
"""

import jax
import jax.numpy as jnp


def halo(x: jax.Array, tail: jax.Array | None, width: int) -> tuple[jax.Array, jax.Array]:
    """The tokens before this shard, put in front of it.

    Args:
      x: [batch, time, ...].
      tail: [batch, width, ...], what came before the sequence; None where nothing did.
      width: how many tokens back the function looks.

    Returns: (extended [batch, width + time, ...], or x itself where tail is None; the new tail
      [batch, width, ...], the last tokens seen, zeros where there were fewer).
    """
    time = x.shape[1]
    if tail is None:
        missing = max(width - time, 0)
        padding = [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2)
        return x, jnp.pad(x[:, time - (width - missing) :], padding)
    extended = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return extended, extended[:, time:]
