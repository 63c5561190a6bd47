"""A block of tokens in segments, without decay: exclusive reads, and the segment-wise delta rule.

A tile has as many tokens as a segment or fewer, wherever the segments' borders are: they are counted per document, so
that a packed document is the document alone. Of the document that a tile goes on with, at most one segment is completed
inside it; the documents that start inside it are still in their first segment, where there is nothing to read. So a
token belongs to one of three groups:

    before   it reads the memory that the tile found, and writes into the segment that was open then
    after    it reads the memory with that segment added, and writes into the next
    new      its document started in this tile

All tiles of a block are computed at once, but for a prefix over their memories: a sum, or, since the values that the
segment-wise delta rule writes depend on the memory M and normaliser z that they find (arXiv 2404.07143, equation 5),

    sum of k (v - M^T k / (k . z + eps))^T  =  sum of k v^T - (sum of k k^T / (k . z + eps)) M

an affine map, known once the prefix over normalisers is. Letters of the products: b batch, c tiles, t tokens, n
memories, g queries of one; k and v the widths.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.arguments import Static, spread
from lcx_kernels.chunked_memory.isolation import Marks, Tokens
from lcx_kernels.chunked_memory.state import EPSILON, PRECISION, SegmentState, ratio
from lcx_kernels.chunked_memory.xla_chunks import keep, over_chunks

product = partial(jnp.einsum, precision=PRECISION)


def block(
    static: Static, size: int, tokens: Tokens, marks: Marks, state: SegmentState
) -> tuple[jax.Array | None, SegmentState]:
    """Out and final state of [batch, time] finite tokens of one dtype; ``size`` divides time, and is at most a segment.

    With inclusive reads out is not what is read, but the values that segment_delta writes, [batch, time, S, V].
    """
    tiles = _Tiles(static, size, tokens, marks)
    early, late, state = tiles.advance(state)
    if static.read == "inclusive":
        return tiles.joined(tiles.v - tiles.held(tiles.k[..., None, :], early, late)[..., 0, :]), state
    return None if tiles.q is None else tiles.joined(tiles.held(tiles.q, early, late)), state


class _Tiles:
    """The tiles of a block, their arrays [b, c, t, ...] and their tokens' groups."""

    def __init__(self, static: Static, size: int, tokens: Tokens, marks: Marks):
        self.static, self.delta = static, static.update == "segment_delta"
        batch, time = tokens.k.shape[:2]
        split = lambda array: array.reshape(batch, time // size, size, *array.shape[2:])  # noqa: E731
        q, k, v, *_ = jax.tree.map(split, tokens)
        heads = max(k.shape[3], v.shape[3])
        self.k, self.v = spread(k, heads, 3), spread(v, heads, 3)
        if q is not None:
            q = spread(q, max(q.shape[3], heads), 3)
            q = q.reshape(*q.shape[:3], heads, -1, q.shape[-1])
        self.q = q
        closes = split(marks.closes)
        reset = jnp.zeros_like(closes) if marks.reset is None else split(marks.reset)
        self.fresh = reset[:, :, 0]  # [b, c]: the tile finds nothing
        document = jnp.cumsum(reset.at[:, :, 0].set(False), axis=2, dtype=jnp.int32)
        going_on = document == 0
        closes &= going_on
        closed = jnp.cumsum(closes, axis=2, dtype=jnp.int32) > closes  # before the token
        self.before, self.after = going_on & ~closed, going_on & closed
        last = document == document[:, :, -1:]
        self.opened = last & ~self.before  # what they write is open at the end, though not from the start on
        self.renewed = ~going_on[:, :, -1]  # [b, c]: another document at the end
        self.closed = closes.any(axis=2)  # [b, c]: the segment that was open is complete

    def joined(self, array: jax.Array) -> jax.Array:
        """[b, c, t, n, ..., V] as [batch, time, heads, V]."""
        return array.reshape(array.shape[0], array.shape[1] * array.shape[2], -1, array.shape[-1])

    def advance(self, state: SegmentState) -> tuple[tuple, tuple, SegmentState]:
        """What tokens before and after the border of each tile read, (M, z or None) [b, c, ...]; the final state."""
        k_before, k_opened = keep(self.before, self.k), keep(self.opened, self.k)
        z, late_z, final_z, maps = None, None, (None, None), None
        if self.static.normalize:
            written = k_before.sum(axis=2), k_opened.sum(axis=2)
            z, late_z, final_z = self._prefix((state.normalizer, state.open_normalizer), written)
        if self.delta:
            maps = self._map(self.before, z), self._map(self.after, late_z)
        written = [
            product("bctnk,bctnv->bcnkv", k, keep(mask, self.v))
            for mask, k in ((self.before, k_before), (self.opened, k_opened))
        ]
        memory, late_memory, final = self._prefix((state.memory, state.open_memory), tuple(written), maps)
        return (memory, z), (late_memory, late_z), SegmentState(final[0], final_z[0], final[1], final_z[1])

    def _map(self, mask: jax.Array, normalizer: jax.Array) -> jax.Array:
        """[b, c, n, K, K]: what the masked tokens' keys take off the memory that they read."""
        k = keep(mask, self.k)
        below = keep(mask, product("bctnk,bcnk->bctn", k, normalizer)) + EPSILON
        return product("bctnk,bctnl->bcnkl", k, k / below[..., None])

    def _prefix(self, state: tuple, written: tuple, maps: tuple | None = None) -> tuple[jax.Array, jax.Array, tuple]:
        """From tile to tile, for memories or normalisers: of complete segments, and of the open one.

        Args: state ([b, ...], [b, ...]); written and maps ([b, c, ...], [b, c, ...]) before and after the border.
        Returns: what each tile finds, that once the open segment is complete [b, c, ...], and the final state.
        """

        def tile(state, inputs):
            written, maps, fresh, renewed, closed = inputs
            complete, opened = (keep(~fresh, part) for part in state)
            opened = opened + written[0]
            if maps is not None:
                opened = opened - product("bnkl,bnlv->bnkv", maps[0], complete)
            late, left = complete + opened, written[1]
            if maps is not None:
                left = left - keep(~renewed, product("bnkl,bnlv->bnkv", maps[1], keep(~renewed, late)))
            end = keep(~renewed, choose(closed, late, complete)), choose(closed | renewed, left, opened)
            return end, (complete, late)

        final, (found, late) = over_chunks(tile, state, (written, maps, self.fresh, self.renewed, self.closed))
        return found, late, final

    def held(self, x: jax.Array, early: tuple, late: tuple) -> jax.Array:
        """What x [b, c, t, n, g, K] finds, [b, c, t, n, g, V]: exactly 0 where its document has no memory yet."""
        above = below = 0
        for mask, (memory, normalizer) in ((self.before, early), (self.after, late)):
            masked = keep(mask, x)
            above += keep(mask, product("bctngk,bcnkv->bctngv", masked, memory))
            if normalizer is not None:
                below += keep(mask, product("bctngk,bcnk->bctng", masked, normalizer))
        return ratio(above, below) if self.static.normalize else above


def choose(rows: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """One in the marked rows, bool [batch], and the other in the rest."""
    return jnp.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)
