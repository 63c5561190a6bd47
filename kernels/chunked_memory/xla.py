"""The segmented memory in plain XLA operations, one tile of tokens at a time.

A tile has segment_length tokens, wherever the segments' borders are: they are counted per document, so that a packed
document is the document alone. Of the document that a tile goes on with, at most one segment can end inside it; the
documents that start inside it are still in their first segment, where there is nothing to read. So a token belongs to
one of three groups:

    before   it reads the memory that the tile found, and writes into the segment that was open then
    after    it reads the memory with that segment added, and writes into the next
    new      its document started in this tile

The backward pass computes each tile again from the state before it.
"""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.state import SegmentState, ratio, read, written


def segment_memory(q, k, v, opens, reset, delta: bool, segment_length: int, state: SegmentState):
    """q [batch, time, n, g, K]; k [batch, time, n, K]; v [batch, time, n, V]; opens, reset bool [batch, time].

    `opens` marks the first token of a segment, `reset` of a document. Returns (out [batch, time, n, g, V], state).
    """
    batch, time = opens.shape
    size = min(segment_length, time)
    valid = jnp.ones_like(opens)  # what fills up the last tile is not

    def tiles(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), (0, -time % size)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, -1, size, *array.shape[2:]), 1, 0)

    tile = jax.checkpoint(functools.partial(_tile, delta), prevent_cse=False)
    state, out = jax.lax.scan(tile, state, jax.tree.map(tiles, (q, k, v, opens, reset, valid)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :time], state


def _tile(delta: bool, state: SegmentState, tokens: tuple) -> tuple[SegmentState, jax.Array]:
    q, k, v, opens, reset, valid = tokens
    state = jax.tree.map(jnp.zeros_like, state).where(reset[:, 0], state)
    document = jnp.cumsum(reset[:, 1:], axis=1, dtype=jnp.int32)
    document = jnp.pad(document, ((0, 0), (1, 0)))  # of the tile; 0 is the one that it goes on with
    new = document > 0
    closed = jnp.cumsum(opens & ~new, axis=1, dtype=jnp.int32) > 0
    before, after = ~new & ~closed, ~new & closed

    def only(mask: jax.Array, array: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(*mask.shape, *[1] * (array.ndim - 2)), array, 0)

    def found(q: jax.Array, early: SegmentState, late: SegmentState) -> jax.Array:
        """What each token reads; exactly 0 where its document has no memory yet."""
        parts = (
            read(early.memory, early.normalizer, only(before, q)),
            read(late.memory, late.normalizer, only(after, q)),
        )
        return ratio(*jax.tree.map(jnp.add, *parts))

    def correction(mask: jax.Array, state: SegmentState) -> jax.Array:
        return ratio(*read(state.memory, state.normalizer, only(mask, k)[:, :, :, None]))[:, :, :, 0]

    if delta:
        v = v - correction(before, state)
    memory, normalizer = written(only(before & valid, k), v)
    state = state._replace(open_memory=state.open_memory + memory, open_normalizer=state.open_normalizer + normalizer)
    next_state = state.closed()
    out = found(q, state, next_state)
    if delta:
        v = v - correction(after, next_state)
    # What the tile leaves open is the last segment of its last document, if that is not the one written above.
    last = document == document[:, -1:]
    memory, normalizer = written(only(last & ~before & valid, k), v)
    fresh = jax.tree.map(jnp.zeros_like, state)
    state = fresh.where(new[:, -1], next_state.where(closed[:, -1], state))
    state = state._replace(open_memory=state.open_memory + memory, open_normalizer=state.open_normalizer + normalizer)
    return state, out
