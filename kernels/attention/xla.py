"""Blockwise attention in plain JAX, laid out for CPUs: temporaries linear in T, masked blocks skipped.

Queries are cut into blocks of ``chunk_size``. A block meets in one piece the keys that it may see; which these are is
known while tracing when the alignment is static (``Band``). The forward keeps only the log-sum-exp; the backward
(Dao et al. 2022, FlashAttention, algorithm 4) computes the scores of each block again.

Consecutive blocks form a run, which is one ``lax.scan``, so that the program does not grow with T. A run's blocks meet
either the same keys (what a causal block does not need of them is masked) or, under a window, as many keys each,
starting ``chunk_size`` further on.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.attention.arguments import Arguments, Static, delta_of
from lcx_kernels.attention.visibility import NO_KEY_LOG_SUM_EXP, Band, Keys, Queries, band, sides, visible
from lcx_kernels.residuals import named
from lcx_kernels.varying import vary_alike

# Runs that a causal triangle is cut into: n runs compute (n + 1) / n of the triangle. A run has two blocks if it can,
# because a loop reuses its memory, and writing to fresh memory costs more here than the scores that are masked.
MAX_TRIANGLE_RUNS = 8

# Up to so many queries times key heads, as in decoding, all heads are one product, which is mostly of zeros: to lay out
# the keys by heads would take longer than to read them that many times.
FEW = 8

# The default chunk_size is the largest of these by which T is at least 8 blocks and a block has at most so many scores
# (64 MB in float32); the smallest if none is. Measured on two cores, where few long blocks beat many that fit a cache.
CHUNK_SIZES = (128, 64, 32)
SCORES_PER_BLOCK = 2**24


class Plan(NamedTuple):
    """What is known while tracing."""

    band: Band
    scale: float
    softcap: float | None
    chunk_size: int


class Run(NamedTuple):
    """The query blocks begin to end, of which the i-th from begin meets ``extent`` keys from start + i * step on."""

    begin: int
    end: int
    start: int
    step: int
    extent: int


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V], log_sum_exp [batch, time, heads]), both in the dtype of the accumulators."""
    return _attention(_plan(arguments, static), *arguments[:3], *sides(arguments, static))


def gradients(arguments: Arguments, static: Static, log_sum_exp, d_out, delta) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) of `api.attention_gradients`."""
    arrays = (*arguments[:3], *sides(arguments, static), log_sum_exp, d_out, delta)
    return _gradients(_plan(arguments, static), *vary_alike(arrays))


def _plan(arguments: Arguments, static: Static) -> Plan:
    batch, time, heads, _ = arguments.q.shape
    known = band(static)
    chunk_size = static.chunk_size or _default_chunk_size(batch * heads, time, arguments.k.shape[1], known)
    chunk_size = math.ceil(time / math.ceil(time / chunk_size))  # as even as can be, which pads least
    return Plan(known, static.scale, static.softcap, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q, k, v, queries: Queries, keys: Keys):
    return _forward(plan, q, k, v, queries, keys)


def _forward(plan: Plan, q, k, v, queries: Queries, keys: Keys):
    time, kv_heads = q.shape[1], k.shape[2]
    if time * kv_heads <= FEW:
        return _forward_few(plan, q, k, v, queries, keys)
    # One for each query, taken block by block like these: of a lone number that is known before a run's loop, XLA makes
    # a block of scores before the loop, and keeps those of all runs at once.
    unseen = jnp.full((1, time), -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
    q, queries, keys, unseen = _together(q, queries, keys, unseen)
    rows = _pad((q, queries, unseen), plan.chunk_size)
    k, v = _heads_first(k), _heads_first(v)

    def block(_, number_and_start, extent):
        number, start = number_and_start
        q_block, queries_block, unseen = _take(rows, number, plan.chunk_size)
        k_part, v_part, keys_part = _slice_keys((k, v, keys), start, extent)
        q_block = _split_heads(q_block, kv_heads) * plan.scale
        out, log_sum_exp = _forward_block(q_block, k_part, v_part, queries_block, keys_part, unseen, plan.softcap)
        return None, (_join_heads(out), _join_heads(log_sum_exp[..., None])[..., 0])

    pieces = []
    for run in _runs(plan, time, k.shape[2]):
        pieces.append(_over_blocks(functools.partial(block, extent=run.extent), None, run)[1])
    return jax.tree.map(lambda *parts: _join_blocks(parts, time), *pieces)


def _forward_with_residuals(plan: Plan, q, k, v, queries: Queries, keys: Keys):
    results = _forward(plan, q, k, v, queries, keys)
    return results, (q, k, v, queries, keys, *results)


def _backward(plan: Plan, residuals, cotangents):
    *arrays, out, log_sum_exp = residuals
    delta = delta_of((out, log_sum_exp), cotangents)
    return *_gradients(plan, *arrays, log_sum_exp, cotangents[0], delta), None, None


def _gradients(plan: Plan, q, k, v, queries: Queries, keys: Keys, log_sum_exp, d_out, delta):
    time, kv_heads = q.shape[1], k.shape[2]
    rows = _pad((q, d_out, log_sum_exp[..., None], delta[..., None], queries), plan.chunk_size)
    dtypes = q.dtype, k.dtype, v.dtype
    k, v = _heads_first(k), _heads_first(v)

    def block(sums, number_and_start, extent):
        number, start = number_and_start
        *arrays, queries_block = _take(rows, number, plan.chunk_size)
        q_block, d_out_block, *of_row = (_split_heads(x, kv_heads) for x in arrays)
        of_row = [x[..., 0] for x in of_row]
        k_part, v_part, keys_part = _slice_keys((k, v, keys), start, extent)
        dq, *parts = _backward_block(
            q_block * plan.scale, d_out_block, *of_row, k_part, v_part, queries_block, keys_part, plan.softcap
        )
        dq = _join_heads(jnp.moveaxis(dq, 2, -1)) * plan.scale
        return tuple(_add_at(total, part, start) for total, part in zip(sums, parts, strict=True)), dq

    sums = jnp.zeros_like(k), jnp.zeros_like(v)
    pieces = []
    for run in _runs(plan, time, k.shape[2]):
        sums, piece = _over_blocks(functools.partial(block, extent=run.extent), sums, run)
        pieces.append(piece)
    dk, dv = (jnp.swapaxes(x, 1, 2) for x in sums)
    found = _join_blocks(pieces, time), dk, dv
    return tuple(x.astype(dtype) for x, dtype in zip(found, dtypes, strict=True))


_attention.defvjp(named(_forward_with_residuals), _backward)


def _together(*arrays):
    """The same arrays, none of them known before the queries, which are among them, are.

    Masks do not depend on what a layer computes. Where layers are a scan that is differentiated, JAX would compute what
    all blocks' masks and fillings are ahead of it, and keep that: for each head, T times the keys.
    """
    return jax.lax.optimization_barrier(arrays)


# One block of queries. c is chunk_size, n the key and value heads, g the query heads of each, s the keys it meets.


def _forward_block(q, k, v, queries: Queries, keys: Keys, unseen, softcap: float | None):
    """From q [batch, n, g, c, K], k [batch, n, s, K], v [batch, n, s, V] to out [..., c, V], log_sum_exp [..., c].

    unseen: [1, c], the score of what a query does not see, -inf.
    """
    mask = visible(
        jax.tree.map(lambda x: x[:, None, None, :, None], queries),
        jax.tree.map(lambda x: x[:, None, None, None, :], keys),
    )
    scores = _cap(jnp.einsum("bngck,bnsk->bngcs", q, k), softcap)
    scores = jnp.where(mask, scores, unseen[:, None, None, :, None])
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    maximum = jnp.where(maximum == -jnp.inf, 0, maximum)
    weights = jnp.exp(scores - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1, total)
    out = jnp.einsum("bngcs,bnsv->bngcv", weights, v) / total
    return out, jnp.where(blind, NO_KEY_LOG_SUM_EXP, maximum + jnp.log(total))[..., 0]


def _backward_block(q, d_out, log_sum_exp, delta, k, v, queries: Queries, keys: Keys, softcap: float | None):
    """Return dq [batch, n, K, g, c] for scores q.k, dk and dv. Scores lie keys first, fastest for dk and dv."""
    mask = visible(
        jax.tree.map(lambda x: x[:, None, None, None, :], queries),
        jax.tree.map(lambda x: x[:, None, :, None, None], keys),
    )
    scores = _cap(jnp.einsum("bnsk,bngck->bnsgc", k, q), softcap)
    weights = jnp.where(mask, jnp.exp(scores - log_sum_exp[:, :, None]), 0)
    d_weights = jnp.einsum("bnsv,bngcv->bnsgc", v, d_out)
    d_scores = jnp.where(mask, weights * (d_weights - delta[:, :, None]), 0)
    if softcap is not None:
        d_scores *= 1 - jnp.square(scores / softcap)
    # K in front: so k is what gets transposed, not the scores, which are many times larger.
    dq = jnp.einsum("bnsk,bnsgc->bnkgc", k, d_scores)
    dk = jnp.einsum("bnsgc,bngck->bnsk", d_scores, q)
    dv = jnp.einsum("bnsgc,bngcv->bnsv", weights, d_out)
    return dq, dk, dv


def _forward_few(plan: Plan, q, k, v, queries: Queries, keys: Keys):
    """`_forward` where keys and values stay as they lie, [batch, s, n * K]: x is K of all n heads, y the rows of q."""
    batch, time, heads, _ = q.shape
    length, n = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    own = jnp.eye(n, dtype=wide)
    q = q.astype(wide).reshape(batch, time, n, heads // n, -1) * plan.scale
    q = jnp.einsum("btngk,nm->bmktng", q, own).reshape(batch, -1, time * heads)
    flat = lambda array: array.astype(wide).reshape(batch, length, -1)  # noqa: E731
    mask = visible(
        jax.tree.map(lambda x: x[:, None, :, None], queries), jax.tree.map(lambda x: x[:, :, None, None], keys)
    )
    scores = _cap(jnp.einsum("bsx,bxy->bsy", flat(k), q), plan.softcap).reshape(batch, length, time, heads)
    scores = jnp.where(mask, scores, -jnp.inf)
    maximum = jnp.max(scores, axis=1, keepdims=True)
    maximum = jnp.where(maximum == -jnp.inf, 0, maximum)
    weights = jnp.exp(scores - maximum)
    total = jnp.sum(weights, axis=1)
    blind = total == 0
    total = jnp.where(blind, 1, total)
    out = jnp.einsum("bsy,bsz->byz", weights.reshape(batch, length, -1), flat(v))
    out = jnp.einsum("btngmv,nm->btngv", out.reshape(batch, time, n, heads // n, n, -1), own)
    log_sum_exp = jnp.where(blind, NO_KEY_LOG_SUM_EXP, maximum[:, 0] + jnp.log(total))
    return out.reshape(batch, time, heads, -1) / total[..., None], log_sum_exp


def _cap(scores, softcap: float | None):
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


# Which keys the blocks meet.


def _default_chunk_size(rows: int, time: int, keys: int, band: Band) -> int:
    def fits(chunk_size: int) -> bool:
        extent = keys if None in band else min(keys, band.reach + chunk_size)
        return 8 * chunk_size <= time and rows * chunk_size * extent <= SCORES_PER_BLOCK

    return next(filter(fits, CHUNK_SIZES), CHUNK_SIZES[-1])


def _runs(plan: Plan, time: int, keys: int) -> list[Run]:
    """Cut the blocks of queries into runs, so that no block meets many more keys than it sees."""
    (offset, reach), chunk_size = plan.band, plan.chunk_size
    num_blocks = math.ceil(time / chunk_size)
    if offset is None:
        return [Run(0, num_blocks, 0, 0, keys)]
    # Blocks whose first query still reaches the first key: the triangle. After them the keys slide along.
    triangle = num_blocks if reach is None else min(num_blocks, max(0, math.ceil((reach - offset) / chunk_size)))
    num_runs = min(MAX_TRIANGLE_RUNS, math.ceil(triangle / 2))
    cuts = [triangle * i // num_runs for i in range(num_runs + 1)] if num_runs else []
    runs = [Run(begin, end, 0, 0, min(keys, offset + end * chunk_size)) for begin, end in itertools.pairwise(cuts)]
    if triangle < num_blocks:
        start = offset + triangle * chunk_size - reach
        runs.append(Run(triangle, num_blocks, start, chunk_size, min(keys, reach + chunk_size)))
    return runs


def _over_blocks(block, carry, run: Run):
    """Apply ``block(carry, (its number, its first key)) -> (carry, results)`` to a run; results get a leading axis."""
    length = run.end - run.begin
    if length == 1:
        carry, results = block(carry, (run.begin, run.start))
        return carry, jax.tree.map(lambda x: x[None], results)
    numbers = jnp.arange(length, dtype=jnp.int32)
    return jax.lax.scan(block, carry, (run.begin + numbers, run.start + run.step * numbers))


def _slice_keys(arrays, start, extent: int):
    """Slice (k, v, keys) along the keys. Near an end dynamic_slice moves the start, and the mask, by index, follows."""
    k, v, keys = arrays
    part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=extent)
    return part(k, axis=2), part(v, axis=2), jax.tree.map(lambda x: part(x, axis=1), keys)


def _add_at(total, part, start):
    """Add ``part`` to the keys that ``_slice_keys`` took."""
    current = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, current + part, start, axis=2)


# Layouts: heads stand in front of time inside. What belongs to queries is laid out anew block by block, in the caches:
# another copy of it all would be memory that is fresh in each call where T is large, and that costs most.


def _heads_first(x):
    """[batch, keys, n, width] to [batch, n, keys, width], in the dtype of the accumulators."""
    return jnp.swapaxes(x, 1, 2).astype(jnp.promote_types(x.dtype, jnp.float32))


def _pad(arrays, chunk_size: int):
    """Fill the last block with zeros along time. A query of zeros has finite scores, and its cotangent is 0."""

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk_size)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(pad, arrays)


def _take(arrays, number, chunk_size: int):
    """The block of that number of arrays [batch, time, ...]."""
    take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=number * chunk_size, slice_size=chunk_size)
    return jax.tree.map(functools.partial(take, axis=1), arrays)


def _split_heads(x, kv_heads: int):
    """[batch, c, heads, width] to [batch, n, g, c, width], in the dtype of the accumulators."""
    batch, time, heads, width = x.shape
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.reshape(batch, time, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _join_heads(x):
    """The inverse of ``_split_heads``."""
    batch, n, g, time, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, time, n * g, width)


def _join_blocks(parts, time: int):
    """Runs of [blocks, batch, c, ...] to [batch, time, ...]."""
    blocks = jnp.moveaxis(jnp.concatenate(parts), 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])[:, :time]
