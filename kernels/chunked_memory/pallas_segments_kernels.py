"""The Pallas kernels of exclusive reads on TPU: Infini-attention's memory (arXiv 2404.07143, equations 3 to 5).

A program has some memories of one batch row and the queries that read them, and goes through time chunk by chunk, with
the states in VMEM: M, z of the complete segments and O, y of the open one. A token of the document that a chunk goes on
with is before or after the end of the segment that was open:

    before   reads M, z: Q M / (Q z + epsilon)        writes into O, y: O1 = O + K^T U, y1 = y + K^T 1
    after    reads M + O1, z + y1                     writes into the next segment
    new      (its document starts in the chunk)       writes into its own first segment

where U = V, or V less what K reads for segment_delta. Most chunks have tokens of the first kind only: the rest is
skipped where there is nothing of it. No product pairs tokens with tokens. The forward kernel also writes the states
that each chunk starts from; the backward kernel goes through the chunks in reverse and computes the rest again.

Heads come in tiles whose lanes fill registers: one memory, or two of 64 lanes. A tile's queries are as many tiles, each
with heads of one memory (or one head of each of two). A normaliser is a row that repeats itself for every head of a
tile, so that it stands below any head's queries.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx_kernels.chunked_memory.pallas_tiles import (
    Lanes,
    as_column,
    cleaned,
    dot,
    each,
    expand,
    fold,
    read,
    read_clean,
    seen,
    stretch,
    where,
    worth,
)
from lcx_kernels.chunked_memory.state import EPSILON


@dataclass(frozen=True)
class Plan:
    """What is known of a call before it is traced."""

    batch: int
    time: int
    heads: int  # memories
    width: int  # K as the caller gave it, and V
    depth: int
    keys: Lanes  # of a tile
    values: Lanes
    queries: int  # heads a memory
    tiles: int  # of a program
    chunk: int
    delta: bool
    normalize: bool
    reads: bool  # whether there is q
    dtype: np.dtype
    interpret: bool

    @property
    def chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def program_heads(self) -> int:
        return self.tiles * self.values.count

    @property
    def blocks(self) -> int:
        return self.heads // self.program_heads

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.blocks, self.chunks

    def readers(self, tile: int) -> list[int]:
        """For the heads of a tile of queries, the place in the tile of the memory that each reads."""
        count = self.keys.count
        return [(tile * count + head) // self.queries for head in range(count)]


class Inputs(NamedTuple):
    """What the kernels read; absent where the call has none."""

    q: jax.Array | None  # [batch, time, heads * queries * K]
    k: jax.Array  # [batch, time, heads * K]
    v: jax.Array
    # int32 [batch, chunks, 1, chunk]: 0 before, 1 after, 3 new; one more if a later document starts in the chunk; -1 no
    # token.
    kinds: jax.Array
    # int32 [batch, chunks, 1, 4]: the first token is a reset; a segment is completed; a document starts inside; there
    # are tokens that are not before
    flags: jax.Array
    memory: jax.Array  # [batch, K, heads * V]
    normalizer: jax.Array | None  # [batch, blocks, program heads, lanes of a tile's keys]
    open_memory: jax.Array
    open_normalizer: jax.Array | None


class _Chunk(NamedTuple):
    inside: jax.Array  # columns, masks
    before: jax.Array
    after: jax.Array
    stays: jax.Array  # not before, and of the segment that the chunk ends in
    fresh: jax.Array  # scalars
    closing: jax.Array
    renewed: jax.Array
    late: jax.Array


def _chunk(refs: dict) -> _Chunk:
    kinds = as_column(refs["kinds"][...].astype(jnp.float32))
    flags = [refs["flags"][0, i] != 0 for i in range(4)]
    after = (kinds == 1) | (kinds == 2)
    return _Chunk(kinds >= 0, kinds == 0, after, (kinds == 1) | (kinds == 3), *flags)


def _unless(flag: jax.Array, values: jax.Array, otherwise: jax.Array | None = None) -> jax.Array:
    """``values``, or ``otherwise`` (0) if the flag is set: by selection, so that not even a NaN passes."""
    return jax.lax.select(flag, jnp.zeros_like(values) if otherwise is None else otherwise, values)


class _State(NamedTuple):
    """Of a tile: a matrix [K, lanes of values] and a row for each of its heads, none if nothing is normalised."""

    matrix: jax.Array
    rows: list[jax.Array]

    def plus(self, other: "_State") -> "_State":
        return jax.tree.map(jnp.add, self, other)


def _load(plan: Plan, refs: dict, prefix: str, suffix: str, index) -> _State:
    matrix = refs[f"{prefix}memory{suffix}"][:, stretch(index, plan.values.size)]
    rows = []
    if plan.normalize:
        ref = refs[f"{prefix}normalizer{suffix}"]
        rows = [ref[pl.ds(index * plan.keys.count + j, 1), :] for j in range(plan.keys.count)]
    return _State(matrix, rows)


def _store(plan: Plan, refs: dict, prefix: str, index, state: _State):
    refs[f"{prefix}memory"][:, stretch(index, plan.values.size)] = state.matrix
    for j, row in enumerate(state.rows):
        refs[f"{prefix}normalizer"][pl.ds(index * plan.keys.count + j, 1), :] = row


def _everywhere(lanes: Lanes, values: jax.Array) -> jax.Array:
    """The sum of all heads' lanes, in every head's."""
    if lanes.count == 1:
        return values
    if lanes.aligned:
        total = sum(lanes.near(values, head) for head in range(lanes.count))
        return jnp.concatenate([total] * lanes.count, axis=1)
    return values + pltpu.roll(values, lanes.width, 1)  # heads that share a register are two


def _picked(plan: Plan, state: _State, readers: list[int]) -> _State:
    """The state as heads see it that read the memories ``readers`` of a tile."""
    rows = [state.rows[reader] for reader in readers] if plan.normalize else []
    if readers == list(range(plan.keys.count)):
        return _State(state.matrix, rows)
    return _State(_everywhere(plan.values, plan.values.only(state.matrix, readers[0])), rows)


def _returned(plan: Plan, gradient: _State, readers: list[int]) -> _State:
    """The gradient of a state from that of what was `_picked`."""
    rows = [jnp.zeros_like(row) for row in gradient.rows]
    for head, reader in enumerate(readers if plan.normalize else []):
        rows[reader] = rows[reader] + _everywhere(plan.keys, plan.keys.only(gradient.rows[head], head))
    matrix = gradient.matrix
    if readers != list(range(plan.keys.count)):
        matrix = plan.values.only(_everywhere(plan.values, matrix), readers[0])
    return _State(matrix, rows)


# Reading, and back.


def _denominators(plan: Plan, x: jax.Array, state: _State) -> list[jax.Array]:
    wide = x.astype(plan.dtype)
    return [plan.keys.sum(wide * row, head) + EPSILON for head, row in enumerate(state.rows)]


def _find(plan: Plan, x: jax.Array, state: _State) -> jax.Array:
    """What keys or queries [tokens, lanes of keys] read."""
    found = dot(x, expand(plan.keys, plan.values, state.matrix))
    return found / plan.values.spread(_denominators(plan, x, state)) if plan.normalize else found


def _find_back(plan: Plan, mask, x, clean_x, worth_x, state: _State, gradient) -> tuple[jax.Array, _State]:
    """Gradients of x and of the state, from that of what the tokens under the mask found."""
    matrix, denominators = expand(plan.keys, plan.values, state.matrix), []
    if plan.normalize:
        inverse = [1 / column for column in _denominators(plan, x, state)]
        scale, wide = plan.values.spread(inverse), gradient.astype(plan.dtype)
        along = wide * (dot(x, matrix) * scale)
        denominators = [where(mask, -plan.values.sum(along, head) * column) for head, column in enumerate(inverse)]
        gradient = wide * scale
    wide = where(mask, gradient.astype(plan.dtype))
    value = worth(wide)
    dx = dot(gradient, matrix, (1, 1))
    rows = []
    for head, (column, row) in enumerate(zip(denominators, state.rows, strict=True)):
        dx = dx + plan.keys.only(column * row, head)
        total = where(mask, column * clean_x.astype(plan.dtype)).sum(axis=0, keepdims=True)
        rows.append(total + seen(mask, worth_x))
    clean = cleaned(wide, value, mask).astype(gradient.dtype)
    product = fold(plan.keys, plan.values, dot(clean_x, clean, (0, 0))) + seen(mask, value + worth_x)
    return where(mask, dx), _State(product, rows)


# Writing.


class _Tokens(NamedTuple):
    """Keys and values of a tile, as they are and with the rows emptied that are not finite numbers."""

    k: jax.Array
    clean_k: jax.Array
    worth_k: jax.Array
    v: jax.Array
    clean_v: jax.Array
    worth_v: jax.Array


def _tokens(plan: Plan, refs: dict, chunk: _Chunk, index) -> _Tokens:
    return _Tokens(
        *read_clean(refs["k"], stretch(index, plan.keys.size), chunk.inside, plan.dtype),
        *read_clean(refs["v"], stretch(index, plan.values.size), chunk.inside, plan.dtype),
    )


def _values(plan: Plan, tokens: _Tokens, mask, reading, state: _State) -> tuple[jax.Array, jax.Array]:
    """U of the tokens under the mask, of which those under ``reading`` have a memory; and what they are worth."""
    if not plan.delta:
        return where(mask, tokens.clean_v), where(mask, tokens.worth_v)
    values = where(mask, tokens.v.astype(plan.dtype) - where(reading, _find(plan, tokens.k, state)))
    value = worth(values)
    return cleaned(values, value, None), value


def _sums(plan: Plan, tokens: _Tokens, mask, values, value) -> _State:
    """What the tokens under the mask write: K^T U and the sum of K."""
    product = fold(plan.keys, plan.values, dot(tokens.clean_k, values, (0, 0)))
    matrix, rows = product + seen(mask, value + tokens.worth_k), []
    if plan.normalize:
        total = where(mask, tokens.clean_k.astype(plan.dtype)).sum(axis=0, keepdims=True) + seen(mask, tokens.worth_k)
        rows = [_everywhere(plan.keys, plan.keys.only(total, head)) for head in range(plan.keys.count)]
    return _State(matrix, rows)


def _sums_back(plan: Plan, tokens: _Tokens, mask, values, gradient: _State) -> tuple[jax.Array, jax.Array]:
    """Gradients of K and U."""
    matrix = expand(plan.keys, plan.values, gradient.matrix)
    dk = dot(values, matrix, (1, 1))
    for head, row in enumerate(gradient.rows):
        dk = dk + plan.keys.only(row, head)
    return where(mask, dk), where(mask, dot(tokens.k, matrix))


# The kernels.


def _names(plan: Plan) -> list[str]:
    return ["memory", "open_memory"] + (["normalizer", "open_normalizer"] if plan.normalize else [])


def forward_kernel(plan: Plan, refs: dict, out: dict, scratch: dict):
    """The outputs of the states carry them from chunk to chunk."""
    del scratch

    @pl.when(pl.program_id(2) == 0)
    def _():
        for name in _names(plan):
            out[name][...] = refs["initial_" + name][...]

    if "memory_borders" in out:
        for name in _names(plan):
            out[name + "_borders"][...] = out[name][...]
    each(plan.tiles, functools.partial(_forward_tile, plan, refs, out, _chunk(refs)))


def _forward_tile(plan: Plan, refs: dict, out: dict, chunk: _Chunk, index):
    tokens = _tokens(plan, refs, chunk, index)
    closed, opened = (
        jax.tree.map(functools.partial(_unless, chunk.fresh), _load(plan, out, prefix, "", index))
        for prefix in ("", "open_")
    )
    values, value = _values(plan, tokens, chunk.before, chunk.before, closed)
    opened = opened.plus(_sums(plan, tokens, chunk.before, values, value))
    complete = closed.plus(opened)
    _store(plan, out, "", index, jax.tree.map(functools.partial(_unless, chunk.closing), closed, complete))
    _store(plan, out, "open_", index, jax.tree.map(functools.partial(_unless, chunk.closing), opened))
    tiles = range(plan.queries if plan.reads else 0)
    places = [index * plan.queries + tile for tile in tiles]
    for tile, place in zip(tiles, places, strict=True):
        q = read(refs["q"], stretch(place, plan.keys.size), plan.dtype)
        found = where(chunk.before, _find(plan, q, _picked(plan, closed, plan.readers(tile))))
        out["out"][:, stretch(place, plan.values.size)] = found.astype(out["out"].dtype)

    @pl.when(chunk.late)
    def _():
        values, value = _values(plan, tokens, chunk.stays, chunk.after, complete)
        _store(plan, out, "open_", index, _sums(plan, tokens, chunk.stays, values, value))
        _store(plan, out, "", index, jax.tree.map(functools.partial(_unless, chunk.renewed), complete))
        for tile, place in zip(tiles, places, strict=True):
            lanes = stretch(place, plan.values.size)
            q = read(refs["q"], stretch(place, plan.keys.size), plan.dtype)
            found = _find(plan, q, _picked(plan, complete, plan.readers(tile)))
            found = jnp.where(chunk.after, found, out["out"][:, lanes].astype(found.dtype))
            out["out"][:, lanes] = found.astype(out["out"].dtype)


def backward_kernel(plan: Plan, refs: dict, out: dict, scratch: dict):
    """The outputs of the states' gradients carry them from chunk to chunk, backwards."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for name in _names(plan):
            gradient = refs["final_d" + name][...]
            # Of a row that repeats itself, the caller sees the first.
            out["d" + name][...] = gradient if "memory" in name else _everywhere(plan.keys, gradient)

    each(plan.tiles, functools.partial(_backward_tile, plan, refs, out, scratch, _chunk(refs)))

    @pl.when(step == plan.chunks - 1)
    def _():
        for name in _names(plan):
            if "memory" not in name:
                out["d" + name][...] = plan.keys.only(out["d" + name][...], 0)


def _backward_tile(plan: Plan, refs: dict, out: dict, scratch: dict, chunk: _Chunk, index):
    tokens = _tokens(plan, refs, chunk, index)
    closed, opened = (
        jax.tree.map(functools.partial(_unless, chunk.fresh), _load(plan, refs, prefix, "_borders", index))
        for prefix in ("", "open_")
    )
    d_closed, d_opened = _load(plan, out, "d", "", index), _load(plan, out, "dopen_", "", index)
    # Of the states before the chunk's end, what reaches them past it; a new document leaves nothing of them.
    unless_renewed = functools.partial(_unless, chunk.renewed)
    before_close = jax.tree.map(functools.partial(_unless, chunk.closing), d_opened, d_closed)
    _store(plan, scratch, "d", 0, jax.tree.map(unless_renewed, d_closed))
    _store(plan, scratch, "dopen_", 0, jax.tree.map(unless_renewed, before_close))
    for name in ("dk", "dv"):
        scratch[name][...] = jnp.zeros_like(scratch[name])
    tiles = range(plan.queries if plan.reads else 0)
    if plan.reads:
        lanes = stretch(index, plan.queries * plan.keys.size)
        out["dq"][:, lanes] = jnp.zeros((plan.chunk, plan.queries * plan.keys.size), out["dq"].dtype)
    values, value = _values(plan, tokens, chunk.before, chunk.before, closed)

    def back(mask, reading, values, state: _State, written: _State) -> _State:
        """Through what the tokens under the masks wrote and read; returns the gradient of the state that they read."""
        dk, du = _sums_back(plan, tokens, mask, values, written)
        found = jax.tree.map(jnp.zeros_like, state)
        if plan.delta:
            through, gradient = _find_back(
                plan, reading, tokens.k, tokens.clean_k, tokens.worth_k, state, where(reading, -du)
            )
            dk, found = dk + through, found.plus(_returned(plan, gradient, list(range(plan.keys.count))))
        scratch["dk"][...] += dk
        scratch["dv"][...] += du
        for tile in tiles:
            place, readers = index * plan.queries + tile, plan.readers(tile)
            lanes = stretch(place, plan.keys.size)
            q = read_clean(refs["q"], lanes, chunk.inside, plan.dtype)
            dout = read(refs["dout"], stretch(place, plan.values.size), plan.dtype)
            dq, gradient = _find_back(plan, reading, *q, _picked(plan, state, readers), dout)
            out["dq"][:, lanes] = (out["dq"][:, lanes].astype(dq.dtype) + dq).astype(out["dq"].dtype)
            found = found.plus(_returned(plan, gradient, readers))
        return found

    @pl.when(chunk.late)
    def _():
        complete = closed.plus(opened.plus(_sums(plan, tokens, chunk.before, values, value)))
        late, _ = _values(plan, tokens, chunk.stays, chunk.after, complete)
        found = back(chunk.stays, chunk.after, late, complete, d_opened)
        for prefix in ("d", "dopen_"):
            _store(plan, scratch, prefix, 0, _load(plan, scratch, prefix, "", 0).plus(found))

    d_written = _load(plan, scratch, "dopen_", "", 0)
    found = back(chunk.before, chunk.before, values, closed, d_written)
    d_closed = _load(plan, scratch, "d", "", 0).plus(found)
    unless_fresh = functools.partial(_unless, chunk.fresh)
    _store(plan, out, "d", index, jax.tree.map(unless_fresh, d_closed))
    _store(plan, out, "dopen_", index, jax.tree.map(unless_fresh, d_written))
    out["dk"][:, stretch(index, plan.keys.size)] = scratch["dk"][...].astype(out["dk"].dtype)
    out["dv"][:, stretch(index, plan.values.size)] = scratch["dv"][...].astype(out["dv"].dtype)
