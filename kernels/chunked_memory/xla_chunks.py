"""A block of tokens in chunks: pairs of tokens inside a chunk, a state between chunks.

With L(t, s) the sum of log-decays over s < r <= t and w the values that are written (arXiv 2405.21060, section 6; arXiv
2406.06484, section 3.2 for the delta rule),

    out[t] = sum over s <= t of exp(L(t, s)) (q[t] . k[s]) w[s]  +  exp(L(t, start)) q[t] M
    M'     = exp(L(end, start)) M + sum over s of exp(L(end, s)) k[s] w[s]^T

and w is v, or for the delta rule the solution of a triangular system, of which M enters linearly:

    w[t] + beta[t] sum over s < t of exp(L(t, s)) (k[t] . k[s]) w[s] = beta[t] (v[t] - exp(L(t, start)) k[t] M)

Letters of the products: b batch, n chunks, t and s tokens of a chunk; heads are a (of the keys), r (memories of one
such head, which share the products of its queries and keys) and g (queries of one memory); k and v the widths.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.arguments import Static, spread
from lcx_kernels.chunked_memory.decay import decayed_products, sums_after, sums_between, sums_up_to
from lcx_kernels.chunked_memory.isolation import Marks, Tokens
from lcx_kernels.chunked_memory.state import PRECISION, SegmentState, ratio
from lcx_kernels.chunked_memory.triangular import inverse

product = partial(jnp.einsum, precision=PRECISION)


def block(
    static: Static, size: int, tokens: Tokens, marks: Marks, state: SegmentState
) -> tuple[jax.Array | None, SegmentState]:
    """Out and final state of [batch, time] finite tokens of one dtype; ``size``, a power of two, divides time."""
    chunks = _Chunks(static, size, tokens, marks)
    state = jax.tree.map(chunks.split_state, state)
    found, written, state = chunks.advance(state)
    return chunks.read(found, written), jax.tree.map(chunks.join_state, state)


def keep(mask: jax.Array, array: jax.Array) -> jax.Array:
    """The array where the mask, of its first axes, is set, and 0 elsewhere."""
    return jnp.where(mask.reshape(*mask.shape, *[1] * (array.ndim - mask.ndim)), array, 0)


class _Chunks:
    """The chunks of a block, their arrays [b, n, t, ...] and what is said of their tokens."""

    def __init__(self, static: Static, size: int, tokens: Tokens, marks: Marks):
        self.static = static
        batch, time = tokens.k.shape[:2]
        split = lambda array: array.reshape(batch, time // size, size, *array.shape[2:])  # noqa: E731
        q, k, v, log_decay, beta = jax.tree.map(split, tokens)
        heads = max(k.shape[3], v.shape[3])
        self.channels = log_decay is not None and log_decay.ndim == 5
        # Heads of the products of queries and keys: as few as can be, but with a decay a channel they all differ.
        queries = k.shape[3] if q is None else q.shape[3]
        few, many = sorted((min(queries, heads), k.shape[3]))
        alike = heads if self.channels or many % few else many
        self.groups = alike, heads // alike, max(1, queries // heads)
        a, r, g = self.groups
        self.q = None if q is None else spread(q, a * g, 3).reshape(*q.shape[:3], a, g, -1)
        self.k = spread(k, a, 3)
        self.v = spread(v, heads, 3).reshape(*v.shape[:3], a, r, -1)
        by_head = lambda array: None if array is None else array.reshape(*array.shape[:3], a, r)  # noqa: E731
        self.beta = by_head(beta)
        self.log_decay = log_decay if self.channels else by_head(log_decay)
        self._mark(*(None if mark is None else split(mark) for mark in marks))

    def _mark(self, closes: jax.Array | None, reset: jax.Array | None) -> None:
        """Which tokens see the incoming state, which last into the final one, and which pairs of tokens meet."""
        shape = self.k.shape[:3]
        count = lambda marks: jnp.cumsum(marks, axis=2, dtype=jnp.int32)  # noqa: E731
        document = jnp.zeros(shape, jnp.int32) if reset is None else count(reset)
        order = jnp.arange(shape[2])
        self.pairs = (document[:, :, :, None] == document[:, :, None, :]) & (order[:, None] >= order)
        self.first, self.last = document == 0, document == document[:, :, -1:]
        self.fresh = ~self.first[:, :, -1]  # [b, n]
        if closes is not None:
            complete = count(closes)
            segment = complete - closes  # how many were complete before the token
            self.complete = segment < complete[:, :, -1:]  # the token's own is, at the end
            self.later = self.first & (
                segment > 0
            )  # of the tokens that see the incoming state, those in later segments
            self.closed = (closes & self.first).any(
                axis=2
            )  # [b, n]: the segment that was open at the start is complete
            if self.static.read == "exclusive":
                self.pairs &= segment[:, :, :, None] > segment[:, :, None, :]

    def split_state(self, part: jax.Array) -> jax.Array:
        return part.reshape(part.shape[0], *self.groups[:2], *part.shape[2:])

    def join_state(self, part: jax.Array) -> jax.Array:
        return part.reshape(part.shape[0], -1, *part.shape[3:])

    def pair_factors(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Products of x [b, n, t, a, i, K] and decayed keys, [b, n, a, r, i, t, s], 0 outside of the mask."""
        x, k = jnp.moveaxis(x, 2, 4), jnp.moveaxis(self.k, 2, 3)  # tokens go behind heads
        mask = mask[:, :, None, None, None]
        if self.channels:
            products = decayed_products(x, k, jnp.moveaxis(self.log_decay, 2, 3))[:, :, :, None]
            return jnp.where(mask, products, 0)
        products = jnp.where(mask, product("bnaitk,bnask->bnaits", x, k)[:, :, :, None], 0)
        if self.log_decay is None:
            return products
        decay = jnp.exp(sums_between(jnp.moveaxis(self.log_decay, 2, 4)))[:, :, :, :, None]
        # Batch and chunks as one axis: XLA's CPU backend (jaxlib 0.10.2) crashes on sums of products of seven.
        flat = lambda array: array.reshape(-1, *array.shape[2:])  # noqa: E731
        factors = jnp.where(flat(mask), flat(products) * flat(decay), 0)
        return factors.reshape(*products.shape[:2], *factors.shape[1:])

    def from_start(self, array: jax.Array) -> jax.Array:
        """[b, n, t, a, r, g, ...] times the decay of a head since the chunk's start."""
        if self.log_decay is None or self.channels:
            return array
        decay = jnp.exp(sums_up_to(self.log_decay, 2))
        return array * decay.reshape(*decay.shape, *[1] * (array.ndim - 5))

    def seen_from_start(self, x: jax.Array) -> jax.Array:
        """x [b, n, t, a, i, K], decayed since the chunk's start where channels decay by themselves."""
        return x * jnp.exp(sums_up_to(self.log_decay, 2))[:, :, :, :, None] if self.channels else x

    def sums(self, values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The masked tokens' writes as left at the end of each chunk, [b, n, a, r, K, V] and [b, n, a, r, K]."""
        k, values = keep(mask, self.k), keep(mask, values)
        weights = keep(mask, jnp.ones_like(values[..., 0]))
        if self.log_decay is not None:
            decay = jnp.exp(sums_after(self.log_decay, 2))
            if self.channels:
                k = keep(mask, k * decay)
            else:
                values, weights = keep(mask, values * decay[..., None]), keep(mask, weights * decay)
        memory = product("bnsak,bnsarv->bnarkv", k, values)
        return memory, product("bnsak,bnsar->bnark", k, weights) if self.static.normalize else None

    def advance(self, state: SegmentState) -> tuple[SegmentState, jax.Array, SegmentState]:
        """The state that each chunk finds [b, n, ...], the values that are written, and the final state."""
        if self.static.update == "delta_rule":
            return self._advance_delta_rule(state)
        segmented = self.static.segmented
        masks = [self.last & self.complete, self.last & ~self.complete] if segmented else [self.last]
        memory, normalizer = zip(*(self.sums(self.v, mask) for mask in masks), strict=True)
        opened = lambda sums: sums[1] if segmented else None  # noqa: E731
        written = SegmentState(memory[0], normalizer[0], opened(memory), opened(normalizer))

        def chunk(state, inputs):
            written, decay, fresh, closed = inputs
            before = state
            if closed is not None:
                state = state.closed().where(closed, state)
            state = self._carried(state, decay, fresh)
            return jax.tree.map(jnp.add, state, written), before

        closed = self.closed if segmented else None
        state, found = over_chunks(chunk, state, (written, self._whole_decay(), self.fresh, closed))
        return found, self.v, state

    def _whole_decay(self) -> jax.Array | None:
        """Of the whole chunk, [b, n, a, r or 1, K or 1]."""
        if self.log_decay is None:
            return None
        decay = jnp.exp(jnp.sum(self.log_decay, axis=2))
        return decay[:, :, :, None] if self.channels else decay[..., None]

    def _carried(self, state: SegmentState, decay: jax.Array | None, fresh: jax.Array) -> SegmentState:
        """What is left of the state at the end of a chunk; decay [b, a, r, K or 1], fresh [b]."""
        state = jax.tree.map(lambda part: keep(~fresh, part), state)
        if decay is not None:
            state = jax.tree.map(lambda part: part * decay.reshape(*decay.shape, *[1] * (part.ndim - 4)), state)
            state = jax.tree.map(lambda part: keep(~fresh, part), state)
        return state

    def _advance_delta_rule(self, state: SegmentState) -> tuple[SegmentState, jax.Array, SegmentState]:
        order = jnp.arange(self.k.shape[2])
        k = self.k[:, :, :, :, None]
        beta = jnp.moveaxis(self.beta, 2, 4)[..., None]  # [b, n, a, r, t, 1]
        system = beta * self.pair_factors(k, self.pairs & (order[:, None] > order))[:, :, :, :, 0]
        a, r, _ = self.groups
        seen = keep(self.first, self.seen_from_start(k))  # [b, n, t, a, 1, K]
        seen = self.from_start(jnp.broadcast_to(seen, (*seen.shape[:3], a, r, seen.shape[-1])))
        sides = jnp.moveaxis(jnp.concatenate([self.v, seen], axis=-1), 2, 4)
        # Where keys are so long that a document overflows, others in its chunk do not.
        found = jnp.where(self.pairs[:, :, None, None], inverse(system), 0)
        solved = product("bnarts,bnarsv->bnartv", found, beta * sides)
        width = self.v.shape[-1]
        values, seen = solved[..., :width], keep(self.first, jnp.moveaxis(solved[..., width:], 4, 2))

        def chunk(state, inputs):
            values, seen, k, decay, fresh, first, last = inputs
            held = keep(first, product("btark,barkv->btarv", seen, state.memory))
            values = jnp.moveaxis(values, 3, 1) - held
            written = keep(last, values)
            if decay is not None and not self.channels:
                written = keep(last, written * decay[0][..., None])
            added = product("btak,btarv->barkv", k, written)
            left = self._carried(state, None if decay is None else decay[1], fresh)
            return SegmentState(left.memory + added, None, None, None), (state, values)

        k, decay = keep(self.last, self.k), None
        if self.log_decay is not None:
            after = jnp.exp(sums_after(self.log_decay, 2))
            k = keep(self.last, k * after) if self.channels else k
            decay = after, self._whole_decay()
        state, (found, values) = over_chunks(chunk, state, (values, seen, k, decay, self.fresh, self.first, self.last))
        return found, values, state

    def read(self, found: SegmentState, values: jax.Array) -> jax.Array | None:
        """Out [batch, time, heads, V], given the state that each chunk finds and what its tokens write."""
        if self.q is None:
            return None
        pairs = self.pair_factors(self.q, self.pairs)
        values, overflown = self._finite(values)
        out = product("bnargts,bnsarv->bntargv", pairs, values)
        below = jnp.moveaxis(pairs.sum(axis=-1), 5, 2) if self.static.normalize else None
        seen = self.seen_from_start(self.q)
        exclusive = self.static.read == "exclusive"
        for part, mask in ((found[:2], self.first), (found[2:], self.later if exclusive else None)):
            if part[0] is None or mask is None:
                continue
            q = keep(mask, seen)
            out += self.from_start(keep(mask, product("bntagk,bnarkv->bntargv", q, part[0])))
            if below is not None:
                below += self.from_start(keep(mask, product("bntagk,bnark->bntarg", q, part[1])))
        out = out if below is None else ratio(out, below)
        out = out if overflown is None else jnp.where(overflown, jnp.nan, out)
        return out.reshape(out.shape[0], -1, self.groups[0] * self.groups[1] * self.groups[2], out.shape[-1])

    def _finite(self, values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Finite values, and where the delta rule, whose keys are too long, has left others: [b, n, t, a, r, 1, 1]."""
        if self.static.update != "delta_rule":
            return values, None
        bad = ~jnp.isfinite(values).all(axis=-1)
        meets = product("bnts,bnsar->bntar", self.pairs.astype(values.dtype), bad.astype(values.dtype))
        return jnp.where(bad[..., None], 0, values), (meets > 0)[..., None, None]


def over_chunks(chunk, state, inputs):
    """A scan over the second axis, n, of the inputs; without a loop where n is 1."""
    moved = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), inputs)
    if jax.tree.leaves(moved)[0].shape[0] == 1:
        state, found = chunk(state, jax.tree.map(lambda array: array[0], moved))
        return state, jax.tree.map(lambda array: array[:, None], found)
    state, found = jax.lax.scan(chunk, state, moved)
    return state, jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), found)
