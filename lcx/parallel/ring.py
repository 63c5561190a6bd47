"""Exact attention over a sequence that is cut over devices: keys and values travel round the ring of shards.

Liu et al. 2023, arXiv 2310.01889 (Ring Attention); Brandon et al. 2023, arXiv 2311.09431 (balance). Each shard attends
its queries to its own keys, then to those of the shard before, and so on; partial results are merged by their
log-sum-exp. The backward pass goes round once more; the log-sum-exp of the whole is all that a shard needs for the
gradients of a part. Those of keys and values travel with them, so that no shard ever holds more than two shards of
keys.

Causally, contiguous shards have unequal work: the last one sees everything. So around the ring, and only there, time
is dealt out in 2 R pieces, of which shard r holds the r-th and the r-th from the end. Then each hop is half of all
pairs of a query and a key, on every shard, and no pair of them is masked by causality (`BALANCED`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.parallel.sequence import MeshAxis, shift
from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP, attention, attention_gradients


class Hop(NamedTuple):
    """What a shard does with keys from another one: which of its queries meet which of the keys, in halves."""

    queries: slice
    keys: slice


BOTH, FIRST, SECOND = slice(0, 2), slice(0, 1), slice(1, 2)


class Schedule(NamedTuple):
    """The work of a hop, by whether the keys come from an earlier or a later shard; None: there is nothing to do."""

    earlier: Hop
    later: Hop | None


# Halves (r, 2R-1-r): of a shard s < r, the piece s is before both of mine and 2R-1-s after both; of a shard s > r both
# pieces are after my first and before my second.
BALANCED = Schedule(earlier=Hop(BOTH, FIRST), later=Hop(SECOND, BOTH))
CONTIGUOUS = Schedule(earlier=Hop(BOTH, BOTH), later=None)


class Static(NamedTuple):
    """What a ring knows while it is traced."""

    axis: MeshAxis
    shards: int
    schedule: Schedule
    scale: float | None
    backend: str


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents: jax.Array,
    *,
    axis: MeshAxis,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal attention within documents, over all shards; called inside a shard_map, manual over `axis`.

    Args:
      q: this shard's queries, [batch, time, heads, K].
      k, v: its keys and values, [batch, time, kv_heads, K or V].
      documents: int32 [batch, time]; a query sees keys of its own document only.
      axis: the mesh axis that cuts time.
      scale, backend: as of `lcx_kernels.attention.attention`.

    Returns: (out [batch, time, heads, V], log_sum_exp [batch, time, heads]), both at least float32. Differentiable in
      both; sinks are folded in by the caller, once.
    """
    shards = jax.lax.axis_size(axis)
    balanced = q.shape[1] % 2 == 0
    static = Static(axis, shards, BALANCED if balanced else CONTIGUOUS, scale, backend)
    if not balanced:
        return _ring(static, q, k, v, documents)
    q, k, v, documents = (deal(array, axis) for array in (q, k, v, documents))
    return tuple(collect(array, axis) for array in _ring(static, q, k, v, documents))


def deal(x: jax.Array, axis: MeshAxis) -> jax.Array:
    """From contiguous shards [batch, time, ...] to the pieces r and 2R-1-r of 2R on shard r."""
    shards = jax.lax.axis_size(axis)
    owner = lambda piece: min(piece, 2 * shards - 1 - piece)  # noqa: E731
    even, odd = (
        jax.lax.ppermute(half, axis, [(shard, owner(2 * shard + parity)) for shard in range(shards)])
        for parity, half in enumerate(jnp.split(x, 2, axis=1))
    )
    # One of a shard's pieces has an even number, the other an odd one; the piece r comes first.
    is_even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis=1)


def collect(x: jax.Array, axis: MeshAxis) -> jax.Array:
    """The inverse of `deal`."""
    shards = jax.lax.axis_size(axis)
    owner = lambda piece: min(piece, 2 * shards - 1 - piece)  # noqa: E731
    first, second = jnp.split(x, 2, axis=1)
    is_even = jax.lax.axis_index(axis) % 2 == 0
    pieces = jnp.where(is_even, first, second), jnp.where(is_even, second, first)
    halves = [
        jax.lax.ppermute(piece, axis, [(owner(2 * shard + parity), shard) for shard in range(shards)])
        for parity, piece in enumerate(pieces)
    ]
    return jnp.concatenate(halves, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array) -> tuple:
    out, log_sum_exp = _own(static, q, k, v, documents)

    def attend(sums: tuple, kv: tuple, hop: jax.Array) -> tuple:
        meet = lambda part: lambda: _meet(static, part, q, documents, kv)  # noqa: E731
        return _merge(*sums, *_by_source(static, hop, meet, lambda: _nothing(*sums)))

    return _travel(static, attend, (out, log_sum_exp), (k, v, documents))


def _ring_forward(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array) -> tuple:
    results = _ring(static, q, k, v, documents)
    return results, (q, k, v, documents, *results)


def _ring_backward(static: Static, residuals: tuple, cotangents: tuple) -> tuple:
    q, k, v, documents, out, log_sum_exp = residuals
    d_out, d_log_sum_exp = cotangents
    delta = jnp.sum(out * d_out, axis=-1) - d_log_sum_exp
    queries = q, documents, log_sum_exp, d_out, delta
    wide = lambda array: jnp.zeros_like(array, dtype=out.dtype)  # noqa: E731

    def attend(dq: jax.Array, kv: tuple, dkv: tuple, hop: jax.Array) -> tuple:
        pull = lambda part: lambda: _pull(static, part, queries, kv)  # noqa: E731
        new = _by_source(static, hop, pull, lambda: (wide(q), wide(k), wide(v)))
        return dq + new[0], (dkv[0] + new[1], dkv[1] + new[2])

    dq, *dkv = _pull(static, None, queries, (k, v, documents))
    dq, dk, dv = _travel_with_gradients(static, attend, dq, (k, v, documents), tuple(dkv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _travel(static: Static, attend: Any, sums: tuple, kv: tuple) -> tuple:
    """Folds `attend` over the other shards' keys; those of the next hop are on their way while it works."""
    if static.shards == 1:
        return sums
    kv = shift(kv, static.axis, 1, wrap=True)

    def body(carry: tuple, hop: jax.Array) -> tuple:
        sums, kv = carry
        coming = shift(kv, static.axis, 1, wrap=True)
        return (attend(sums, kv, hop), coming), None

    (sums, kv), _ = jax.lax.scan(body, (sums, kv), jnp.arange(1, static.shards - 1))
    return attend(sums, kv, jnp.int32(static.shards - 1))


def _travel_with_gradients(static: Static, attend: Any, dq: jax.Array, kv: tuple, dkv: tuple) -> tuple:
    """The same with the gradients of keys and values, which follow their keys and end at home."""
    if static.shards == 1:
        return dq, *dkv
    kv, dkv = shift((kv, dkv), static.axis, 1, wrap=True)

    def body(carry: tuple, hop: jax.Array) -> tuple:
        dq, kv, dkv = carry
        coming = shift(kv, static.axis, 1, wrap=True)
        dq, dkv = attend(dq, kv, dkv, hop)
        return (dq, coming, shift(dkv, static.axis, 1, wrap=True)), None

    (dq, kv, dkv), _ = jax.lax.scan(body, (dq, kv, dkv), jnp.arange(1, static.shards - 1))
    dq, dkv = attend(dq, kv, dkv, jnp.int32(static.shards - 1))
    return dq, *shift(dkv, static.axis, 1, wrap=True)


def _by_source(static: Static, hop: jax.Array, meet: Any, nothing: Any) -> Any:
    """The work of a hop: at hop h the keys are those of the shard h places earlier, round the ring."""
    later = nothing if static.schedule.later is None else meet(static.schedule.later)
    from_earlier = comes_from_earlier(jax.lax.axis_index(static.axis), hop)
    return jax.lax.cond(from_earlier, meet(static.schedule.earlier), later)


def comes_from_earlier(shard: jax.Array | int, hop: jax.Array | int) -> jax.Array | bool:
    """Whether the keys that a shard meets at a hop, 1 to shards - 1, are those of an earlier shard."""
    return shard >= hop


def _own(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array) -> tuple:
    """Attention to the shard's own keys: causal in the order in which it holds them, dealt out or not."""
    return _wide(attention(q, k, v, segment_ids=documents, scale=static.scale, backend=static.backend))


def _meet(static: Static, part: Hop, q: jax.Array, documents: jax.Array, kv: tuple) -> tuple:
    """Attention to another shard's keys, all of them visible but for documents; results for all of the queries."""
    k, v, others = (_halves(array, part.keys) for array in kv)
    queries, ids = _halves(q, part.queries), _halves(documents, part.queries)
    out, log_sum_exp = _wide(
        attention(queries, k, v, causal=False, segment_ids=(ids, others), scale=static.scale, backend=static.backend)
    )
    time = q.shape[1]
    return _whole(out, part.queries, time), _whole(log_sum_exp, part.queries, time, NO_KEY_LOG_SUM_EXP)


def _pull(static: Static, part: Hop | None, queries: tuple, kv: tuple) -> tuple:
    """(dq, dk, dv) of what `_meet` computes, or `_own` where part is None, in the dtype of the sums."""
    lengths = queries[0].shape[1], kv[0].shape[1], kv[1].shape[1]
    sides = (BOTH, BOTH, BOTH) if part is None else (part.queries, part.keys, part.keys)
    q, ids, log_sum_exp, d_out, delta = (_halves(array, sides[0]) for array in queries)
    k, v, others = (_halves(array, sides[1]) for array in kv)
    found = attention_gradients(
        q, k, v, log_sum_exp, d_out, delta,
        causal=part is None, segment_ids=(ids, others), scale=static.scale, backend=static.backend,
    )  # fmt: skip
    return tuple(
        _whole(array.astype(d_out.dtype), which, length)
        for array, which, length in zip(found, sides, lengths, strict=True)
    )


def _halves(array: jax.Array, which: slice) -> jax.Array:
    half = array.shape[1] // 2
    return array if which == BOTH else array[:, which.start * half : which.stop * half]


def _whole(array: jax.Array, which: slice, length: int, missing: float = 0.0) -> jax.Array:
    """The inverse of `_halves`, with ``missing`` for the other half."""
    if which == BOTH:
        return array
    before = which.start * array.shape[1]
    padding = [(0, 0), (before, length - before - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return jnp.pad(array, padding, constant_values=missing)


def _wide(results: tuple) -> tuple:
    out, log_sum_exp = results
    return out.astype(log_sum_exp.dtype), log_sum_exp


def _nothing(out: jax.Array, log_sum_exp: jax.Array) -> tuple:
    return jnp.zeros_like(out), jnp.full_like(log_sum_exp, NO_KEY_LOG_SUM_EXP)


def _merge(out: jax.Array, log_sum_exp: jax.Array, new_out: jax.Array, new_log_sum_exp: jax.Array) -> tuple:
    """Attention over two disjoint sets of keys, from that over each."""
    total = jnp.logaddexp(log_sum_exp, new_log_sum_exp)
    weight = lambda part: jnp.exp(part - total)[..., None]  # noqa: E731
    return weight(log_sum_exp) * out + weight(new_log_sum_exp) * new_out, total
