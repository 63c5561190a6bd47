"""What every backend of the chunked memory is given."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.state import SegmentState


class Arguments(NamedTuple):
    """The arrays of a call, checked, in the caller's dtypes; what was left out is None.

    There are S = max(k heads, v heads) memories, and max(q heads, S) heads of out. Of any two of these numbers one
    divides the other: head h of the larger goes with head h // ratio of the smaller.

    Tokens with ``reset`` start from an empty state. ``closes`` marks the last token of each segment; it is there if and
    only if segments matter (`Static.segmented`). In a document these tokens are chunk_size apart; in one that starts
    after the row's first token, the first of them is its chunk_size-th. So chunk_size tokens in a row hold at most one,
    of the document that they go on with, unless they are one segment exactly.
    """

    q: jax.Array | None  # [batch, time, q heads, K]; None where only the final state is wanted
    k: jax.Array  # [batch, time, k heads, K]
    v: jax.Array  # [batch, time, v heads, V]
    log_decay: jax.Array | None  # [batch, time, S] or [batch, time, S, K], not positive
    beta: jax.Array | None  # [batch, time, S]; there if and only if the update is delta_rule
    closes: jax.Array | None  # bool [batch, time]
    reset: jax.Array | None  # bool [batch, time]
    state: SegmentState  # in the dtype of the arithmetic; normalizer if normalised, open parts if segmented

    @property
    def dtype(self) -> jnp.dtype:
        """Of all arithmetic and of states: float32, or float64 if anything is."""
        arrays = [self.q, self.k, self.v, self.log_decay, self.beta, *self.state]
        return jnp.result_type(jnp.float32, *(array for array in arrays if array is not None))

    @property
    def heads(self) -> int:
        """S, the number of memories."""
        return max(self.k.shape[2], self.v.shape[2])


class Static(NamedTuple):
    """What is known of a call while tracing; see `api.chunked_memory`."""

    update: str
    read: str
    normalize: bool
    chunk_size: int  # the length of segments if `segmented`, else only how many tokens may be taken at once

    @property
    def segmented(self) -> bool:
        """Whether the meaning, not only the computation, depends on segments: the state has open parts."""
        return self.update == "segment_delta" or self.read == "exclusive"


def spread(array: jax.Array, heads: int, axis: int = 2) -> jax.Array:
    """The array with its axis of heads repeated to ``heads``, each consecutively."""
    return array if array.shape[axis] == heads else jnp.repeat(array, heads // array.shape[axis], axis=axis)
