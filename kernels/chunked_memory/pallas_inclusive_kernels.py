"""Inclusive reads on TPU: linear attention, SSD and the delta rule, with no decay or one a head, in two Pallas kernels.

Within a chunk, with L[t, s] the sum of log decays after s up to t, D = exp(L), a and w the decays from the chunk's
start and to its end, e over all of it (SSD: arXiv 2405.21060, section 6; delta rule: arXiv 2412.06464, section 3.3):

    A   = tril(Q K^T * D)
    out = A U + a Q M         divided by A 1 + a Q z + epsilon, if normalised
    M'  = e M + K^T (w U)     z' = e z + K^T w

where U = V, and for the delta rule the U that solves (1 + B) U = beta (V - a K M), B = stril(beta K K^T * D).

A program has some heads of one batch row and goes through time chunk by chunk: the grid is (batch, blocks of heads,
chunks), the last one in order, with M in VMEM. Heads come in tiles whose lanes fill registers. Either every head has
keys of its own, or all heads of a program share them, and then also Q K^T and the products that its gradient takes.
States are [K, heads * V], so that no lanes of memory are empty. The forward kernel also writes the state that each
chunk starts from; the backward kernel goes through the chunks in reverse and computes the rest again. With X the
gradient of A, and N, H the gradient of M' and its product with K:

    dQ = (X * D) K + a dOut M^T            dU = A^T dOut + w H
    dK = (X * D)^T Q + w U N^T             dM = e N + (a Q)^T dOut

and what reaches a log decay is a sum over the pairs t, s that it lies between. For the delta rule dU passes through the
transposed system to dV, beta, K and M.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lcx_kernels.chunked_memory.pallas_inverse import unit_lower_inverse
from lcx_kernels.chunked_memory.pallas_tiles import (
    Lanes,
    as_column,
    as_row,
    cleaned,
    dot,
    each,
    expand,
    fold,
    places,
    read,
    read_clean,
    seen,
    stretch,
    sums_down,
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
    shared: bool  # one head of keys for all the heads of a program
    tiles: int  # of a program
    key_programs: int  # programs that share one block of keys
    chunk: int
    delta: bool
    normalize: bool
    decays: bool
    documents: bool  # whether tokens of a chunk may not see one another, or be none
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

    @property
    def key_lanes(self) -> int:
        """Of a program."""
        return self.keys.size * (1 if self.shared else self.tiles)

    @property
    def state_rows(self) -> int:
        return self.keys.width


# What both kernels compute of a chunk.


class Marks(NamedTuple):
    """Which tokens see which. Masks; columns are None for all tokens."""

    upto: jax.Array  # [t, s]: s is in t's document, and t or before it
    before: jax.Array  # without t
    inside: jax.Array | None  # column: is a token
    first: jax.Array | None  # column: of the document that the chunk goes on with
    last: jax.Array | None  # column: of the document that goes on after it
    resets: jax.Array | None  # [1, 1], a number: of resets in the chunk

    def carried(self, values: jax.Array) -> jax.Array:
        """What lasts over the whole chunk: 0 if there is a reset."""
        return where(None if self.resets is None else jnp.broadcast_to(self.resets, values.shape) == 0, values)


def read_marks(refs: dict, size: int) -> Marks:
    t, s = places(size)
    if "document" not in refs:
        return Marks(s <= t, s < t, None, None, None, None)
    row = refs["document"][...].astype(jnp.float32)
    column, resets = as_column(row), row.max(axis=1, keepdims=True)
    same = row == column
    return Marks((s <= t) & same, (s < t) & same, column >= 0, column == 0, column == resets, resets)


class _Keys(NamedTuple):
    """Queries and keys of a tile: as they are, and with the rows emptied that are not finite numbers."""

    q: jax.Array | None
    k: jax.Array
    clean_q: jax.Array | None
    clean_k: jax.Array
    worth_q: jax.Array | None
    worth_k: jax.Array
    scores: list[jax.Array]  # Q K^T by head
    overlaps: list[jax.Array]  # K K^T by head, for the delta rule


def _keys(plan: Plan, refs: dict, marks: Marks, lanes) -> _Keys:
    q, clean_q, worth_q = read_clean(refs["q"], lanes, marks.inside, plan.dtype) if plan.reads else (None, None, None)
    k, clean_k, worth_k = read_clean(refs["k"], lanes, marks.inside, plan.dtype)
    heads, scores, overlaps = range(plan.keys.count), [], []
    if plan.reads:
        scores = [dot(plan.keys.part(q, head), plan.keys.near(k, head), (1, 1)) for head in heads]
    if plan.delta:
        overlaps = [dot(plan.keys.part(clean_k, head), plan.keys.near(clean_k, head), (1, 1)) for head in heads]
    return _Keys(q, k, clean_q, clean_k, worth_q, worth_k, scores, overlaps)


class _Decays(NamedTuple):
    """Of a head."""

    pairs: jax.Array | None  # [t, s], of what s wrote until t; None for none
    start: jax.Array  # column: from the chunk's start on; 0 for other documents
    end: jax.Array  # column: until the chunk's end
    whole: jax.Array  # [1, 1]; 0 over a reset

    def of(self, values: jax.Array) -> jax.Array:
        return values if self.pairs is None else values * self.pairs


def _decays(plan: Plan, refs: dict, marks: Marks, head, broken: list) -> _Decays:
    """Sums of log decays over stretches of tokens, each a sum of its own. To ``broken`` goes what NaNs are worth."""
    one = jnp.ones((plan.chunk, 1), plan.dtype)
    if not plan.decays:
        return _Decays(None, where(marks.first, one), where(marks.last, one), marks.carried(one[:1]))
    t, s = places(plan.chunk)
    row = refs["decay"][pl.ds(head, 1), :]
    if plan.delta:
        broken.append(where(marks.inside, as_column(jnp.where(row == row, jnp.zeros_like(row), row))))
        row = jnp.where(row == row, row, jnp.zeros_like(row))
    rows = jnp.broadcast_to(row, t.shape)
    start, end = (jnp.exp(where(mask, rows).sum(axis=1, keepdims=True)) for mask in (s <= t, s > t))
    pairs = jnp.exp(sums_down(where(s < t, jnp.broadcast_to(as_column(row), t.shape))))
    whole = marks.carried(jnp.exp(row.sum(axis=1, keepdims=True)))
    return _Decays(pairs, where(marks.first, start), where(marks.last, end), whole)


class _Solved(NamedTuple):
    """The delta rule's system in a tile."""

    beta: list[jax.Array]  # columns
    found: jax.Array  # K M
    rest: jax.Array  # V - a K M
    decayed: list[jax.Array]  # stril(K K^T * D)
    inverse: list[jax.Array]  # of 1 + B


class _Tile(NamedTuple):
    decays: list[_Decays]
    start: jax.Array  # the same on the lanes of values
    end: jax.Array
    whole: jax.Array
    weights: list[jax.Array]  # A
    written: jax.Array  # U: finite
    worth: jax.Array  # of what a token writes
    solved: _Solved | None


def _tile(plan: Plan, refs: dict, marks: Marks, keys: _Keys, index, memory) -> _Tile:
    heads = [index * plan.values.count + j for j in range(plan.values.count)]
    broken = []
    decays = [_decays(plan, refs, marks, head, broken) for head in heads]
    start, end, whole = (plan.values.spread([getattr(d, name) for d in decays]) for name in ("start", "end", "whole"))
    v, clean_v, value = read_clean(refs["v"], stretch(index, plan.values.size), marks.inside, plan.dtype)
    written, solved = clean_v, None
    if plan.delta:
        value = value + keys.worth_k + sum(broken)
        written, value, solved = _solve(plan, refs, marks, keys, heads, decays, start, v, value, memory)
    weights, shown = [], as_row(value)
    for j, decay in enumerate(decays if plan.reads else []):
        weights.append(where(marks.upto, decay.of(keys.scores[0 if plan.shared else j]) + shown))
    if not plan.delta:
        value = value + keys.worth_k  # which Q K^T shows by itself
    return _Tile(decays, start, end, whole, weights, written, value, solved)


def _solve(plan, refs, marks, keys, heads, decays, start, v, value, memory):
    """Returns U, what its tokens are worth, and the system."""
    found = where(marks.first, dot(keys.k, expand(plan.keys, plan.values, memory)))
    rest = v.astype(plan.dtype) - where(marks.first, start * found)
    betas = [as_column(refs["beta"][pl.ds(head, 1), :]) for head in heads]
    value = value + where(marks.inside, worth(rest) + sum(beta * 0 for beta in betas))
    rest = cleaned(rest, value, marks.inside)
    betas = [cleaned(beta, value, marks.inside) for beta in betas]
    decayed = [where(marks.before, d.of(keys.overlaps[0 if plan.shared else j])) for j, d in enumerate(decays)]
    inverse = [unit_lower_inverse(beta * pairs) for beta, pairs in zip(betas, decayed, strict=True)]
    right = plan.values.spread(betas) * rest
    written = plan.values.merge([dot(T, plan.values.near(right, j)) for j, T in enumerate(inverse)])
    return written, value, _Solved(betas, found, rest, decayed, inverse)


def _written(plan: Plan, tile: _Tile, marks: Marks) -> jax.Array:
    """w U: what is left of each token's write at the chunk's end."""
    if not plan.decays:
        return where(marks.last, tile.written)  # as narrow as v
    return where(marks.last, tile.end * tile.written)


# The kernels.


def forward_kernel(plan: Plan, refs: dict, out: dict, scratch: dict):
    """`out["memory"]` and `out["normalizer"]` carry the states from chunk to chunk."""
    del scratch
    states = [name for name in ("memory", "normalizer") if name in out]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for name in states:
            out[name][...] = refs["initial" if name == "memory" else "initial_normalizer"][...]

    if "borders" in out:
        for name in states:
            out["borders" if name == "memory" else "normalizer_borders"][...] = out[name][...]
    marks = read_marks(refs, plan.chunk)
    common = _keys(plan, refs, marks, slice(None)) if plan.shared else None
    each(plan.tiles, functools.partial(_forward_tile, plan, refs, out, marks, common))


def _forward_tile(plan: Plan, refs: dict, out: dict, marks: Marks, common: _Keys | None, index):
    keys = common or _keys(plan, refs, marks, stretch(index, plan.keys.size))
    lanes = stretch(index, plan.values.size)
    memory = out["memory"][:, lanes]
    tile = _tile(plan, refs, marks, keys, index, memory)
    if plan.reads:
        found = [dot(A, plan.values.near(tile.written, j)) for j, A in enumerate(tile.weights)]
        found = plan.values.merge(found)
        found = found + where(marks.first, tile.start * dot(keys.q, expand(plan.keys, plan.values, memory)))
        if plan.normalize:
            found = found / plan.values.spread(
                [
                    _denominator(plan, marks, keys, tile, j, _normalizer(plan, out["normalizer"], index, j))
                    for j in range(plan.values.count)
                ]
            )
        out["out"][:, lanes] = found.astype(out["out"].dtype)
    product = fold(plan.keys, plan.values, dot(keys.clean_k, _written(plan, tile, marks), (0, 0)))
    out["memory"][:, lanes] = marks.carried(tile.whole * memory) + product + seen(marks.last, tile.worth)
    for j in range(plan.values.count if plan.normalize else 0):
        decay, z = tile.decays[j], _normalizer(plan, out["normalizer"], index, j)
        sums = where(marks.last, decay.end * keys.clean_k.astype(plan.dtype)).sum(axis=0, keepdims=True)
        z = marks.carried(decay.whole * z) + _of_head(plan, sums, j) + seen(marks.last, keys.worth_k)
        _set_normalizer(plan, out["normalizer"], index, j, _of_head(plan, z, j))


def _of_head(plan: Plan, row: jax.Array, head: int) -> jax.Array:
    """A row on the lanes of keys, 0 outside of the head's."""
    return plan.keys.only(row, head) if plan.keys.count > 1 else row


def _normalizer(plan: Plan, ref, index, head) -> jax.Array:
    return ref[pl.ds(index * plan.values.count + head, 1), :]


def _set_normalizer(plan: Plan, ref, index, head, row):
    ref[pl.ds(index * plan.values.count + head, 1), :] = row


def _denominator(plan: Plan, marks: Marks, keys: _Keys, tile: _Tile, head: int, z: jax.Array) -> jax.Array:
    """A column: A 1 + a Q z + epsilon."""
    found = (keys.q.astype(plan.dtype) * z).sum(axis=1, keepdims=True)
    # The weights also show NaNs of v, as the numerator does.
    return tile.weights[head].sum(axis=1, keepdims=True) + where(marks.first, tile.decays[head].start * found) + EPSILON


def backward_kernel(plan: Plan, refs: dict, out: dict, scratch: dict):
    """`out["dmemory"]` and `out["dnormalizer"]` carry the gradients of the states from chunk to chunk, backwards."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        out["dmemory"][...] = refs["dfinal"][...]
        if plan.normalize:
            out["dnormalizer"][...] = refs["dfinal_normalizer"][...]

    marks = read_marks(refs, plan.chunk)
    common = _keys(plan, refs, marks, slice(None)) if plan.shared else None
    for ref in scratch.values():
        ref[...] = jnp.zeros_like(ref)
    each(plan.tiles, functools.partial(_backward_tile, plan, refs, out, scratch, marks, common))
    if not plan.shared:
        return
    dk = scratch["k"][...]
    if plan.reads:
        scores = scratch["scores"][...]
        out["dq"][...] = (scratch["q"][...] + dot(scores, common.clean_k)).astype(out["dq"].dtype)
        dk = dk + dot(scores, common.clean_q, (0, 0))
    if plan.delta:
        overlaps = scratch["overlaps"][...]
        dk = dk + dot(overlaps, common.clean_k) + dot(overlaps, common.clean_k, (0, 0))
    out["dk"][...] = dk.astype(out["dk"].dtype)


class _Read(NamedTuple):
    """Gradients of what a tile reads."""

    numerator: jax.Array  # of A U + a Q M
    clean: jax.Array
    worth: jax.Array
    found: jax.Array | None  # Q M, where it is needed
    weights: list[jax.Array]  # of A, before decays
    denominators: list[jax.Array]  # columns


def _read_gradients(plan: Plan, refs, marks: Marks, keys: _Keys, tile: _Tile, index, memory) -> _Read:
    numerator = read(refs["dout"], stretch(index, plan.values.size), plan.dtype)
    found = None
    if plan.decays or plan.normalize:
        found = where(marks.first, dot(keys.q, expand(plan.keys, plan.values, memory)))
    inverse, heads = [], range(plan.values.count)
    if plan.normalize:
        for j in heads:
            z = _normalizer(plan, refs["normalizer_borders"], index, j)
            inverse.append(1 / _denominator(plan, marks, keys, tile, j, z))
        numerator = numerator.astype(plan.dtype) * plan.values.spread(inverse)
    wide = numerator.astype(plan.dtype)
    value = where(marks.inside, worth(wide))
    clean = cleaned(wide, value, marks.inside).astype(numerator.dtype)
    weights, denominators = [], []
    for j in heads:
        dA = dot(plan.values.part(numerator, j), plan.values.near(tile.written, j), (1, 1))
        if plan.normalize:
            total = where(marks.upto, tile.weights[j] * dA).sum(axis=1, keepdims=True)
            total = total + where(marks.first, tile.decays[j].start * plan.values.sum(wide * found, j))
            denominators.append(-inverse[j] * total)
            dA = dA + denominators[j]
        weights.append(dA)
    return _Read(numerator, clean, value, found, weights, denominators)


def _backward_tile(plan: Plan, refs: dict, out: dict, scratch: dict, marks: Marks, common: _Keys | None, index):
    keys = common or _keys(plan, refs, marks, stretch(index, plan.keys.size))
    lanes, heads = stretch(index, plan.values.size), range(plan.values.count)
    memory, d_memory = refs["borders"][:, lanes], out["dmemory"][:, lanes]
    tile = _tile(plan, refs, marks, keys, index, memory)
    held = dot(keys.k, expand(plan.keys, plan.values, d_memory))
    dU = where(marks.last, tile.end * held)
    dk = where(marks.last, dot(_written(plan, tile, marks), expand(plan.keys, plan.values, d_memory), (1, 1)))
    carried = marks.carried(tile.whole * d_memory)
    reading, dq, d_scores, pairs, starts = None, None, [], [], [jnp.zeros((plan.chunk, 1), plan.dtype)] * len(heads)
    ends = [plan.values.sum(tile.written.astype(plan.dtype) * held, j) for j in heads] if plan.decays else None
    if plan.reads:
        reading = _read_gradients(plan, refs, marks, keys, tile, index, memory)
        dU = dU + plan.values.merge(
            [
                dot(where(marks.upto, A + reading.worth), plan.values.near(reading.clean, j), (0, 0))
                for j, A in enumerate(tile.weights)
            ]
        )
        d_scores = [where(marks.upto, d.of(dA)) for d, dA in zip(tile.decays, reading.weights, strict=True)]
        if plan.decays:
            pairs = [where(marks.upto, dA * A) for dA, A in zip(reading.weights, tile.weights, strict=True)]
            starts = [plan.values.sum(reading.numerator.astype(plan.dtype) * reading.found, j) for j in heads]
        dq = where(marks.first, dot(tile.start * reading.numerator, expand(plan.keys, plan.values, memory), (1, 1)))
        carried = carried + fold(
            plan.keys, plan.values, dot(keys.clean_q, where(marks.first, tile.start * reading.clean), (0, 0))
        )
        carried = carried + seen(marks.first, reading.worth + keys.worth_q)
    if plan.delta:
        solved = _solve_back(plan, marks, keys, tile, dU, memory, pairs)
        dU, dk, carried = solved.dv, dk - solved.dk, carried - solved.dmemory
        for j in heads:
            out["dbeta"][pl.ds(index * len(heads) + j, 1), :] = as_row(solved.dbeta[j])
        starts = [a - b for a, b in zip(starts, solved.starts, strict=True)] if plan.decays else starts
        pairs = solved.pairs
    whole = [_whole(plan, memory * d_memory, j) for j in heads] if plan.decays else []
    if plan.normalize:
        dq, dk = _normalizer_back(plan, refs, out, marks, keys, tile, reading, index, dq, dk, starts, ends, whole)
    for j, decay in enumerate(tile.decays if plan.decays else []):
        start, end = where(marks.first, decay.start * starts[j]), where(marks.last, decay.end * ends[j])
        gradient = _decay_gradient(pairs[j] if pairs else None, start, end)
        out["ddecay"][pl.ds(index * len(heads) + j, 1), :] = gradient + marks.carried(decay.whole * whole[j])
    out["dv"][:, lanes] = dU.astype(out["dv"].dtype)
    out["dmemory"][:, lanes] = carried
    _key_gradients(plan, out, scratch, keys, index, dq, dk, d_scores, solved.overlaps if plan.delta else [])


class _SolvedBack(NamedTuple):
    """Gradients through the delta rule's system; what is read of the old state has a minus sign."""

    dv: jax.Array
    dk: jax.Array
    dmemory: jax.Array
    dbeta: list[jax.Array]  # columns
    starts: list[jax.Array]
    pairs: list[jax.Array]
    overlaps: list[jax.Array]  # of K K^T


def _solve_back(plan: Plan, marks: Marks, keys: _Keys, tile: _Tile, dU, memory, pairs) -> _SolvedBack:
    """From the gradient of U; ``pairs``, by head, what already reaches the sums of log decays between two tokens."""
    solved, heads = tile.solved, range(plan.values.count)
    value = where(marks.inside, worth(dU))
    clean = cleaned(dU, value, marks.inside)
    shown = where(marks.upto, jnp.broadcast_to(value, marks.upto.shape)).sum(axis=0, keepdims=True)
    right = [dot(T, plan.values.near(clean, j), (0, 0)) for j, T in enumerate(solved.inverse)]
    right = plan.values.merge(right) + as_column(shown)
    dv = plan.values.spread(solved.beta) * right
    dbeta, overlaps, found_pairs = [], [], []
    for j in heads:
        system = where(marks.before, -dot(plan.values.part(right, j), plan.values.near(tile.written, j), (1, 1)))
        of_system = (system * solved.decayed[j]).sum(axis=1, keepdims=True)
        dbeta.append(plan.values.sum(right * solved.rest, j) + of_system)
        system = solved.beta[j] * system
        overlaps.append(where(marks.before, tile.decays[j].of(system)))
        if plan.decays:
            through = where(marks.before, system * solved.decayed[j])
            found_pairs.append(pairs[j] + through if pairs else through)
    clean = cleaned(tile.start * dv, worth(dv), marks.first)
    return _SolvedBack(
        dv=dv,
        dk=where(marks.first, dot(tile.start * dv, expand(plan.keys, plan.values, memory), (1, 1))),
        dmemory=fold(plan.keys, plan.values, dot(keys.clean_k, clean, (0, 0))) + seen(marks.first, worth(dv)),
        dbeta=dbeta,
        starts=[plan.values.sum(dv * solved.found, j) for j in heads],
        pairs=found_pairs,
        overlaps=overlaps,
    )


def _normalizer_back(plan: Plan, refs, out, marks, keys, tile, reading, index, dq, dk, starts, ends, whole):
    """Adds to dq, dk and, in place, to the lists what goes through the normaliser; carries its gradient back."""
    for j, decay in enumerate(tile.decays):
        z = _normalizer(plan, refs["normalizer_borders"], index, j)
        dz = _normalizer(plan, out["dnormalizer"], index, j)
        dk = dk + where(marks.last, decay.end * dz)
        carried = marks.carried(decay.whole * dz)
        if plan.decays:
            ends[j] = ends[j] + (keys.k.astype(plan.dtype) * dz).sum(axis=1, keepdims=True)
            whole[j] = whole[j] + (z * dz).sum(axis=1, keepdims=True)
        if plan.reads:
            q, d_denominator = keys.clean_q.astype(plan.dtype), reading.denominators[j]
            dq = dq + where(marks.first, d_denominator * decay.start * z)
            if plan.decays:
                starts[j] = starts[j] + d_denominator * (q * z).sum(axis=1, keepdims=True)
            carried = carried + where(marks.first, decay.start * d_denominator * q).sum(axis=0, keepdims=True)
            carried = carried + seen(marks.first, keys.worth_q)
        _set_normalizer(plan, out["dnormalizer"], index, j, _of_head(plan, carried, j))
    return dq, dk


def _whole(plan: Plan, product: jax.Array, head: int) -> jax.Array:
    return plan.values.sum(product, head).sum(axis=0, keepdims=True)


def _decay_gradient(pairs: jax.Array | None, start: jax.Array, end: jax.Array) -> jax.Array:
    """A row: the sum of what reaches the log decays' sums over each token.

    ``pairs`` [t, s] of the sum after s up to t; columns: of those from the chunk's start on, and until its end.
    """
    t, s = places(start.shape[0])
    total = jnp.where(s <= t, jnp.broadcast_to(start, t.shape), jnp.broadcast_to(end, t.shape))
    if pairs is not None:
        between = where(s < t, sums_down(pairs, reverse=True)).sum(axis=1, keepdims=True)
        total = total + where(t == s, jnp.broadcast_to(between, t.shape))
    return total.sum(axis=0, keepdims=True)


def _key_gradients(plan: Plan, out: dict, scratch: dict, keys: _Keys, index, dq, dk, d_scores, d_overlaps):
    """Adds what goes through the products of keys; where heads share them, the products are left for the end."""
    if plan.shared:
        scratch["k"][...] += dk
        if plan.reads:
            scratch["q"][...] += dq
            scratch["scores"][...] += sum(d_scores)
        if plan.delta:
            scratch["overlaps"][...] += sum(d_overlaps)
        return
    lanes = stretch(index, plan.keys.size)
    near = plan.keys.near

    def product(pairs: list, values: jax.Array, axis: int) -> jax.Array:
        return plan.keys.merge([dot(pair, near(values, j), (axis, 0)) for j, pair in enumerate(pairs)])

    if plan.reads:
        out["dq"][:, lanes] = (dq + product(d_scores, keys.clean_k, 1)).astype(out["dq"].dtype)
        dk = dk + product(d_scores, keys.clean_q, 0)
    if plan.delta:
        dk = dk + product(d_overlaps, keys.clean_k, 1) + product(d_overlaps, keys.clean_k, 0)
    out["dk"][:, lanes] = dk.astype(out["dk"].dtype)
