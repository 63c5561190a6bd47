"""What every backend receives: checked arrays, and what is known of the call while tracing."""

from typing import NamedTuple

import jax


class Arguments(NamedTuple):
    """The arrays of a call; None where absent.

    q [batch, time, heads, K], k [batch, keys, kv_heads, K] and v [batch, keys, kv_heads, V] have one floating dtype.
    Indices and segments are int32 [batch, time] for queries and [batch, keys] for keys. Indices are given if and only
    if ``Static.offset`` is None, segments both or neither.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    query_index: jax.Array | None
    key_index: jax.Array | None
    query_segment: jax.Array | None
    key_segment: jax.Array | None


class Static(NamedTuple):
    """What is known of a call while tracing; see ``api.attention``.

    ``offset``: query t has the index offset + t and key j the index j; None where indices are arrays.
    """

    causal: bool
    window: int | None
    offset: int | None
    scale: float
    softcap: float | None
    chunk_size: int | None
