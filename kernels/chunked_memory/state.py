"""The state of a chunked memory, and how it is read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # joins the denominator of what is read: an empty memory gives exactly 0
PRECISION = jax.lax.Precision.HIGHEST  # sums over a whole context: no bfloat16 passes on accelerators


class SegmentState(NamedTuple):
    """What a memory knows of one document; S are the heads that have a memory each.

    Where segments matter, what the open segment has written so far stays apart until the segment is complete. Backends
    hold every state in this form; what a call does not have is None.
    """

    memory: jax.Array | None  # [batch, S, K, V]: what the segments that are complete wrote, or all that was written
    normalizer: jax.Array | None  # [batch, S, K]: likewise the keys alone, for normalised reads
    open_memory: jax.Array | None  # the same of the open segment
    open_normalizer: jax.Array | None

    def where(self, rows: jax.Array, other: "SegmentState") -> "SegmentState":
        """This state in the marked rows, bool [batch], and `other` in the rest."""
        return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), self, other)

    def zeros(self) -> "SegmentState":
        """The empty state of this one's shapes."""
        return jax.tree.map(jnp.zeros_like, self)

    def total(self) -> "SegmentState":
        """All that was written, in complete segments or not; nothing stays apart."""
        if self.open_memory is None and self.open_normalizer is None:
            return self
        return SegmentState(
            None if self.memory is None else self.memory + self.open_memory,
            None if self.normalizer is None else self.normalizer + self.open_normalizer,
            None,
            None,
        )

    def closed(self) -> "SegmentState":
        """The state once the open segment is complete."""
        return self.total()._replace(
            open_memory=None if self.open_memory is None else jnp.zeros_like(self.open_memory),
            open_normalizer=None if self.open_normalizer is None else jnp.zeros_like(self.open_normalizer),
        )


def canonical(given: Any) -> SegmentState:
    """A state as `chunked_memory` returns it, M, (M, z) or a `SegmentState`, in the last form: missing parts None."""
    if isinstance(given, SegmentState):
        return given
    return SegmentState(*given, None, None) if isinstance(given, tuple) else SegmentState(given, None, None, None)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """What a normalised read gives (arXiv 2404.07143, equation 3): 0 where nothing was written.

    Args: numerator [..., V], a query on the memory; denominator [...], the same query on the normaliser.
    """
    return numerator / (denominator + EPSILON)[..., None]
