"""The state of a segmented memory, and how it is read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # joins the denominator of what is read: an empty memory gives exactly 0
PRECISION = jax.lax.Precision.HIGHEST  # sums over a whole context: no bfloat16 passes on accelerators


class SegmentState(NamedTuple):
    """What a segmented memory knows of one document; n are the key and value heads.

    Tokens read the memory of the segments before theirs. What their own segment writes stays open until the next one
    begins.
    """

    memory: jax.Array  # [batch, n, K, V]: the sum of k v^T over the segments that are complete
    normalizer: jax.Array  # [batch, n, K]: the sum of k over them
    open_memory: jax.Array  # the same over the tokens of the open segment
    open_normalizer: jax.Array

    def where(self, rows: jax.Array, other: "SegmentState") -> "SegmentState":
        """This state in the marked rows, bool [batch], and `other` in the rest."""
        return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), self, other)

    def closed(self) -> "SegmentState":
        """The state once the open segment is complete."""
        memory, normalizer = self.memory + self.open_memory, self.normalizer + self.open_normalizer
        return SegmentState(memory, normalizer, jnp.zeros_like(memory), jnp.zeros_like(normalizer))


def read(memory: jax.Array, normalizer: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of what queries find (arXiv 2404.07143, equation 3), to be joined by `ratio`.

    Args: memory [batch, n, K, V]; normalizer [batch, n, K]; q [batch, time, n, g, K], g query heads a memory.
    Returns: [batch, time, n, g, V] and [batch, time, n, g].
    """
    numerator = jnp.einsum("btngk,bnkv->btngv", q, memory, precision=PRECISION)
    return numerator, jnp.einsum("btngk,bnk->btng", q, normalizer, precision=PRECISION)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """What is read: 0 where nothing was written."""
    return numerator / (denominator + EPSILON)[..., None]


def written(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What tokens add to memory and normaliser (arXiv 2404.07143, equation 4): k [batch, time, n, K], v likewise V."""
    return jnp.einsum("btnk,btnv->bnkv", k, v, precision=PRECISION), jnp.sum(k, axis=1)
