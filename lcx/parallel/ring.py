"""Exact attention over a sequence that is cut over devices: keys and values travel round the ring of shards.

Liu et al. 2023, arXiv 2310.01889 (Ring Attention); Brandon et al. 2023, arXiv 2311.09431 (balance). Each shard attends
its queries to its own keys, then to those of the shard before, and so on; partial results are merged by their
log-sum-exp. The backward pass goes round once more; the log-sum-exp of the whole is all that a shard needs for the
gradients of a part. Those of keys and values travel with them, so that no shard ever holds more than two shards of
keys.

Causally, contiguous shards have unequal work: the last one sees everything. So around the ring, and only there, time
is dealt out in 2 R pieces, of which shard r holds the r-th and the r-th from the end: its two halves. Then at each hop
two halves of queries meet two halves of keys, on every shard, and no pair of them is masked by causality (`MEETINGS`).
Which halves they are is a matter of data, not of control: a branch would keep the compiler from letting the next keys
travel while these are worked on.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.parallel.sequence import MeshAxis, shift
from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP, attention, attention_gradients
from lcx_kernels.residuals import named

# Of keys from an earlier shard the first half is before both of mine and the second after both; of keys from a later
# one both halves are after my first and before my second. So, as (half of my queries, half of the keys):
MEETINGS = {"earlier": ((1, 0), (0, 0)), "later": ((1, 0), (1, 1))}


class Static(NamedTuple):
    """What a ring knows while it is traced."""

    axis: MeshAxis
    shards: int
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
      documents: int32 [batch, time], at least 0; a query sees keys of its own document only.
      axis: the mesh axis that cuts time.
      scale, backend: as of `lcx_kernels.attention.attention`.

    Returns: (out [batch, time, heads, V], log_sum_exp [batch, time, heads]), both at least float32. Differentiable in
      both; sinks are folded in by the caller, once.
    """
    time = q.shape[1]
    static = Static(axis, jax.lax.axis_size(axis), scale, backend)
    arrays = q, k, v, documents
    if time % 2:  # a token of no document makes halves
        arrays = tuple(_longer(array, value) for array, value in zip(arrays, (0, 0, 0, -1), strict=True))
    results = _ring(static, *(deal(array, axis) for array in arrays))
    return tuple(collect(array, axis)[:, :time] for array in results)


def _longer(array: jax.Array, value: int) -> jax.Array:
    return jnp.pad(array, [(0, 0), (0, 1)] + [(0, 0)] * (array.ndim - 2), constant_values=value)


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
    sums = _own(static, q, k, v, documents)

    def attend(sums: tuple, kv: tuple, hop: jax.Array) -> tuple:
        earlier = comes_from_earlier(jax.lax.axis_index(static.axis), hop)
        for part in _meet(static, earlier, (q, documents), kv):
            sums = _merge(*sums, *part)
        return sums

    return _travel(static, attend, sums, (k, v, documents))


def _ring_forward(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array) -> tuple:
    results = _ring(static, q, k, v, documents)
    return results, (q, k, v, documents, *results)


def _ring_backward(static: Static, residuals: tuple, cotangents: tuple) -> tuple:
    q, k, v, documents, out, log_sum_exp = residuals
    d_out, d_log_sum_exp = cotangents
    delta = jnp.sum(out * d_out, axis=-1) - d_log_sum_exp
    queries = q, documents, log_sum_exp, d_out, delta

    def attend(dq: jax.Array, kv: tuple, dkv: tuple, hop: jax.Array) -> tuple:
        earlier = comes_from_earlier(jax.lax.axis_index(static.axis), hop)
        new_dq, *new_dkv = _pull(static, earlier, queries, kv)
        return dq + new_dq, (dkv[0] + new_dkv[0], dkv[1] + new_dkv[1])

    dq, *dkv = _pull_own(static, queries, (k, v, documents))
    dq, dk, dv = _travel_with_gradients(static, attend, dq, (k, v, documents), tuple(dkv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(named(_ring_forward), _ring_backward)


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


def comes_from_earlier(shard: jax.Array | int, hop: jax.Array | int) -> jax.Array | bool:
    """Whether the keys that a shard meets at a hop, 1 to shards - 1, are those of an earlier shard.

    At hop h they are those of the shard h places earlier, round the ring.
    """
    return shard >= hop


def _own(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array) -> tuple:
    """Attention to the shard's own keys: causal in the order in which it holds them."""
    return _wide(attention(q, k, v, segment_ids=documents, scale=static.scale, backend=static.backend))


def _pull_own(static: Static, queries: tuple, kv: tuple) -> tuple:
    """(dq, dk, dv) of what `_own` computes, in the dtype of the sums."""
    return _gradients(static, queries, kv, causal=True)


def _meet(static: Static, earlier: jax.Array, queries: tuple, kv: tuple) -> list[tuple]:
    """Attention to another shard's keys, all of them visible but for documents.

    Returns (out, log_sum_exp) for all of the queries, one of each meeting; they see disjoint keys.
    """
    (q, ids), (k, v, others) = _stack(earlier, queries, side=0), _stack(earlier, kv, side=1)
    results = _wide(
        attention(q, k, v, causal=False, segment_ids=(ids, others), scale=static.scale, backend=static.backend)
    )
    outs, log_sums = (_spread(earlier, array, 0, missing) for array, missing in zip(results, NOTHING, strict=True))
    return list(zip(outs, log_sums, strict=True))


def _pull(static: Static, earlier: jax.Array, queries: tuple, kv: tuple) -> tuple:
    """(dq, dk, dv) of what `_meet` computes, in the dtype of the sums."""
    found = _gradients(static, _stack(earlier, queries, side=0), _stack(earlier, kv, side=1), causal=False)
    return tuple(sum(_spread(earlier, array, side, 0.0)) for array, side in zip(found, (0, 1, 1), strict=True))


def _gradients(static: Static, queries: tuple, kv: tuple, causal: bool) -> tuple:
    (q, ids, log_sum_exp, d_out, delta), (k, v, others) = queries, kv
    settings = dict(segment_ids=(ids, others), scale=static.scale, backend=static.backend)
    found = attention_gradients(q, k, v, log_sum_exp, d_out, delta, causal=causal, **settings)
    return tuple(array.astype(d_out.dtype) for array in found)


NOTHING = (0.0, NO_KEY_LOG_SUM_EXP)  # the out and log_sum_exp of a query without a key


def _stack(earlier: jax.Array, arrays: tuple, side: int) -> tuple:
    """The halves of a hop's two meetings, one behind the other: [batch, time, ...] to [2 batch, time / 2, ...].

    side: 0 for what belongs to queries, 1 for keys.
    """

    def stack(array: jax.Array) -> jax.Array:
        halves = jnp.split(array, 2, axis=1)
        pairs = zip(MEETINGS["earlier"], MEETINGS["later"], strict=True)
        return jnp.concatenate([_where(earlier, halves, one[side], other[side]) for one, other in pairs])

    return tuple(map(stack, arrays))


def _where(earlier: jax.Array, halves: list, one: int, other: int) -> jax.Array:
    return halves[one] if one == other else jnp.where(earlier, halves[one], halves[other])


def _spread(earlier: jax.Array, stacked: jax.Array, side: int, missing: float) -> list[jax.Array]:
    """Each meeting's result in its half, `missing` in the other one: the inverse of `_stack`."""
    found, empty = [], jnp.full_like(stacked[: stacked.shape[0] // 2], missing)
    for meeting, part in enumerate(jnp.split(stacked, 2)):
        one, other = MEETINGS["earlier"][meeting][side], MEETINGS["later"][meeting][side]
        choose = lambda half: _where(earlier, [empty, part], one == half, other == half)  # noqa: B023, E731
        found.append(jnp.concatenate([choose(0), choose(1)], axis=1))
    return found


def _wide(results: tuple) -> tuple:
    out, log_sum_exp = results
    return out.astype(log_sum_exp.dtype), log_sum_exp


def _merge(out: jax.Array, log_sum_exp: jax.Array, new_out: jax.Array, new_log_sum_exp: jax.Array) -> tuple:
    """Attention over two disjoint sets of keys, from that over each."""
    total = jnp.logaddexp(log_sum_exp, new_log_sum_exp)
    weight = lambda part: jnp.exp(part - total)[..., None]  # noqa: E731
    return weight(log_sum_exp) * out + weight(new_log_sum_exp) * new_out, total
