"""A decay a key channel on TPU, gated linear attention, in two Pallas kernels.

Within a chunk, with a the log decays, c, e and f the decays from the chunk's start up to each token, from it to the
chunk's end, and over all of it, each with K channels (arXiv 2312.06635, section 4):

    P[t, s] = sum over n of q[t, n] k[s, n] exp(a[s+1, n] + .. + a[t, n])  for s <= t, else 0
    out = P V + (c * Q) M           M' = f M + (e * K)^T V

For any two tokens s < t there is one h, a power of two, such that both lie in one block of 2 h tokens, s in its left
half and t in its right one. So with D_h of a token the exponential of the sum of a from its half's start up to it in
right halves, after it to its half's end in left ones,

    P = diag(Q . K) + sum over h of H_h * (D_h * Q) (D_h * K)^T

where H_h marks the pairs of h. Each sum is a product of a matrix of 0 and 1 with a: none has tokens that are not
between the two, nothing is subtracted, and no exponent is above 0. With X_h = H_h * (dOut V^T), G the gradient of M':

    dQ = sum over h of D_h * (X_h (D_h * K)) + c * (dOut M^T)       dV = P^T dOut + (e * K) G
    dK = sum over h of D_h * (X_h^T (D_h * Q)) + e * (V G^T)        dM = f G + (c * Q)^T dOut

and what reaches the sums goes back to a by the matrices that they came from. A program has some heads of one batch row
and goes through time chunk by chunk, as in pallas_inclusive_kernels.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lcx_kernels.chunked_memory.pallas_inclusive_kernels import Marks, read_marks
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
    seen,
    stretch,
    where,
    worth,
)

LOWEST = -1e30  # of a log-decay: sums of these over a chunk stay finite, and its factor is 0 all the same


@dataclass(frozen=True)
class Plan:
    """What is known of a call before it is traced."""

    batch: int
    time: int
    heads: int
    width: int  # K as the caller gave it, and V
    depth: int
    keys: Lanes  # of a tile
    values: Lanes
    tiles: int  # of a program
    chunk: int
    documents: bool  # whether tokens of a chunk may not see one another, or be none
    reads: bool  # whether there is q
    dtype: np.dtype
    interpret: bool

    @property
    def chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def levels(self) -> int:
        return (self.chunk - 1).bit_length()

    @property
    def blocks(self) -> int:
        return self.heads // (self.tiles * self.values.count)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.blocks, self.chunks


class _Tokens(NamedTuple):
    """Of a tile: finite numbers alone, and what the others are worth, as columns."""

    q: jax.Array | None
    k: jax.Array
    v: jax.Array
    decay: jax.Array
    worth_q: jax.Array | None
    written: jax.Array


def _tokens(plan: Plan, refs: dict, marks: Marks, index) -> _Tokens:
    def load(name: str, lanes: Lanes) -> tuple[jax.Array, jax.Array]:
        block = where(marks.inside, refs[name][:, stretch(index, lanes.size)].astype(plan.dtype))
        value = worth(block)
        return cleaned(block, value, None), value

    decay = where(marks.inside, refs["decay"][:, stretch(index, plan.keys.size)].astype(plan.dtype))
    known = decay == decay
    unknown = jnp.where(known, jnp.zeros_like(decay), decay).sum(axis=1, keepdims=True)
    decay = jnp.maximum(where(known, decay), jnp.asarray(LOWEST, plan.dtype))
    q, worth_q = load("q", plan.keys) if plan.reads else (None, None)
    (k, worth_k), (v, worth_v) = load("k", plan.keys), load("v", plan.values)
    return _Tokens(q, k, v, decay, worth_q, worth_k + worth_v + unknown)


class _Sums(NamedTuple):
    """A stretch of tokens for each token, as a matrix of 0 and 1, and what the decays over it leave."""

    matrix: jax.Array
    lasting: jax.Array

    def back(self, gradient: jax.Array) -> jax.Array:
        """To log decays, from the gradient of the sums."""
        return dot(self.matrix, gradient, (0, 0))


def _sums(plan: Plan, mask: jax.Array, decay: jax.Array) -> _Sums:
    exact = jnp.bfloat16 if plan.dtype == np.float32 else plan.dtype  # in which 0 and 1 cost least
    matrix = jnp.where(mask, jnp.ones((), plan.dtype), jnp.zeros((), plan.dtype)).astype(exact)
    return _Sums(matrix, jnp.exp(dot(matrix, decay)))


def _halves(plan: Plan, level: int, decay: jax.Array) -> tuple[_Sums, jax.Array]:
    """(the sums whose exponential is D_h, H_h), h = 2^level."""
    t, s = places(plan.chunk)
    half, other = jnp.right_shift(t, np.int32(level)), jnp.right_shift(s, np.int32(level))
    right = jnp.bitwise_and(half, np.int32(1)) == 1
    mask = (half == other) & ((right & (s <= t)) | (~right & (s > t)))
    return _sums(plan, mask, decay), right & (other + 1 == half)


def _state_sums(plan: Plan, decay: jax.Array) -> tuple[_Sums, _Sums, jax.Array]:
    """(from the chunk's start, to its end, over all of it [1, lanes])"""
    t, s = places(plan.chunk)
    whole = jnp.exp(decay.sum(axis=0, keepdims=True))
    return _sums(plan, s <= t, decay), _sums(plan, s > t, decay), whole


def _to_rows(plan: Plan, row: jax.Array) -> jax.Array:
    """[1, lanes of keys], to multiply a tile's state [K, lanes of values]."""
    return plan.values.spread([where(_own_lane(plan, head), row).sum(axis=1, keepdims=True) for head in _heads(plan)])


def _to_lanes(plan: Plan, values: jax.Array) -> jax.Array:
    """A state's sums over values, [1, lanes of keys]."""
    columns = (where(_own_lane(plan, head), plan.values.sum(values, head)) for head in _heads(plan))
    return sum(columns).sum(axis=0, keepdims=True)


def _own_lane(plan: Plan, head: int) -> jax.Array:
    """[K, lanes of keys]: the lane is the row's channel of the head."""
    shape = plan.keys.width, plan.keys.size
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return lane == row + np.int32(head * plan.keys.width)


def _heads(plan: Plan) -> range:
    return range(plan.keys.count)


def _on_diagonal(column: jax.Array) -> jax.Array:
    t, s = places(column.shape[0])
    return where(t == s, jnp.broadcast_to(column, t.shape))


def _reached(marks: Marks, written: jax.Array) -> jax.Array:
    """A column: NaN from a token of the document on that is worth NaN."""
    return where(marks.upto, jnp.broadcast_to(as_row(written), marks.upto.shape)).sum(axis=1, keepdims=True)


def forward_kernel(plan: Plan, refs: dict, out: dict, scratch: dict):
    """`out["memory"]` carries the state from chunk to chunk."""
    del scratch

    @pl.when(pl.program_id(2) == 0)
    def _():
        out["memory"][...] = refs["initial"][...]

    if "borders" in out:
        out["borders"][...] = out["memory"][...]
    marks = read_marks(refs, plan.chunk)
    each(plan.tiles, functools.partial(_forward_tile, plan, refs, out, marks))


def _forward_tile(plan: Plan, refs: dict, out: dict, marks: Marks, index):
    keys, values, lanes = plan.keys, plan.values, stretch(index, plan.values.size)
    tokens = _tokens(plan, refs, marks, index)
    q, k, v, decay, worth_q, written = tokens
    start, end, whole = _state_sums(plan, decay)
    memory = out["memory"][:, lanes]
    if plan.reads:
        products = [_on_diagonal(keys.sum(q * k, head)) for head in _heads(plan)]
        for level in range(plan.levels):
            sums, pairs = _halves(plan, level, decay)
            late, early = sums.lasting * q, sums.lasting * k
            for head in _heads(plan):
                products[head] += where(pairs, dot(keys.part(late, head), keys.near(early, head), (1, 1)))
        found = values.merge([dot(where(marks.upto, products[h]), values.near(v, h)) for h in _heads(plan)])
        found += where(marks.first, dot(start.lasting * q, expand(keys, values, memory)))
        found += _reached(marks, written) + worth_q
        out["out"][:, lanes] = found.astype(out["out"].dtype)
    added = fold(keys, values, dot(where(marks.last, end.lasting * k), v, (0, 0)))
    kept = marks.carried(_to_rows(plan, whole) * memory)
    out["memory"][:, lanes] = kept + added + seen(marks.last, written)


def backward_kernel(plan: Plan, refs: dict, out: dict, scratch: dict):
    """`out["dmemory"]` carries the gradient of the state from chunk to chunk, backwards."""
    del scratch

    @pl.when(pl.program_id(2) == 0)
    def _():
        out["dmemory"][...] = refs["dfinal"][...]

    marks = read_marks(refs, plan.chunk)
    each(plan.tiles, functools.partial(_backward_tile, plan, refs, out, marks))


def _finite(state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A state's finite numbers alone, and what it is worth, [1, 1]."""
    value = worth(state).sum(axis=0, keepdims=True)
    return jnp.where(jnp.isfinite(state), state, jnp.zeros_like(state)), value


def _backward_tile(plan: Plan, refs: dict, out: dict, marks: Marks, index):
    keys, values, lanes = plan.keys, plan.values, stretch(index, plan.values.size)
    q, k, v, decay, worth_q, written = _tokens(plan, refs, marks, index)
    start, end, whole = _state_sums(plan, decay)
    memory, worth_memory = _finite(refs["borders"][:, lanes])
    late_state, worth_late = _finite(out["dmemory"][:, lanes])
    after = expand(keys, values, late_state)

    early = where(marks.last, end.lasting * dot(v, after, (1, 1)))
    dk, dv = early, where(marks.last, dot(end.lasting * k, after))
    d_decay = end.back(early * k)
    d_decay += marks.carried(whole * _to_lanes(plan, memory * late_state))
    d_memory = marks.carried(_to_rows(plan, whole) * late_state) + marks.carried(worth_late)
    reached = _reached(marks, written) + where(marks.first, jnp.broadcast_to(worth_memory, written.shape))
    spoilt = reached + where(marks.last, jnp.broadcast_to(worth_late, written.shape))
    if plan.reads:
        dout = where(marks.inside, refs["dout"][:, lanes].astype(plan.dtype))
        worth_dout = worth(dout)
        dout = cleaned(dout, worth_dout, None)
        late = where(marks.first, start.lasting * dot(dout, expand(keys, values, memory), (1, 1)))
        d_decay += start.back(late * q)
        d_memory += fold(keys, values, dot(where(marks.first, start.lasting * q), dout, (0, 0)))
        d_memory += seen(marks.first, worth_dout)
        d_products = [where(marks.upto, dot(values.part(dout, h), values.near(v, h), (1, 1))) for h in _heads(plan)]
        own = keys.spread([_diagonal(products) for products in d_products])
        products = [_on_diagonal(keys.sum(q * k, head)) for head in _heads(plan)]
        dq, dk = late + own * k, dk + own * q
        for level in range(plan.levels):
            sums, pairs = _halves(plan, level, decay)
            later, earlier = sums.lasting * q, sums.lasting * k
            chosen = [where(pairs, each_head) for each_head in d_products]
            late = sums.lasting * keys.merge([dot(chosen[h], keys.near(earlier, h)) for h in _heads(plan)])
            early = sums.lasting * keys.merge([dot(chosen[h], keys.near(later, h), (0, 0)) for h in _heads(plan)])
            for head in _heads(plan):
                products[head] += where(pairs, dot(keys.part(later, head), keys.near(earlier, head), (1, 1)))
            dq, dk, d_decay = dq + late, dk + early, d_decay + sums.back(late * q + early * k)
        parts = [dot(where(marks.upto, products[h]), values.near(dout, h), (0, 0)) for h in _heads(plan)]
        dv += values.merge(parts)
        read_later = where(marks.upto, jnp.broadcast_to(worth_dout, marks.upto.shape)).sum(axis=0, keepdims=True)
        spoilt += as_column(read_later)
        dq += worth_dout + reached + worth_q
        out["dq"][:, stretch(index, keys.size)] = dq.astype(out["dq"].dtype)
    out["dk"][:, stretch(index, keys.size)] = (dk + spoilt).astype(out["dk"].dtype)
    out["ddecay"][:, stretch(index, keys.size)] = (d_decay + spoilt).astype(out["ddecay"].dtype)
    out["dv"][:, lanes] = (dv + spoilt).astype(out["dv"].dtype)
    out["dmemory"][:, lanes] = d_memory


def _diagonal(products: jax.Array) -> jax.Array:
    t, s = places(products.shape[0])
    return where(t == s, products).sum(axis=1, keepdims=True)
