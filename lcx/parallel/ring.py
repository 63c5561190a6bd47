"""Exact attention over a sequence that is cut over devices: keys and values travel round the ring of shards.

Liu et al. 2023, arXiv 2310.01889 (Ring Attention); Brandon et al. 2023, arXiv 2311.09431 (balance). Each shard attends
its queries to its own keys, then to those of the shard before, and so on; partial results are merged by their
log-sum-exp. The backward pass goes round once more, and the gradients of keys and values travel with them, so that no
shard ever holds more than two shards of keys.

Causally, contiguous shards have unequal work: the last one sees everything. So around the ring, and only there, time
is dealt out in 2 R pieces, of which shard r holds the r-th and the r-th from the end. Then each hop is half of all
pairs of a query and a key, on every shard, and no pair of them is masked by causality (`BALANCED`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx.parallel.sequence import MeshAxis, shift
from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP, attention


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
    after = (out, log_sum_exp, *cotangents)
    wide = lambda array: jnp.zeros_like(array, dtype=out.dtype)  # noqa: E731

    own = partial(_own, static, documents=documents)
    gradients = tuple(array.astype(out.dtype) for array in _pull(lambda q, k, v: own(q, k, v), (q, k, v), after))

    def attend(dq: jax.Array, kv: tuple, dkv: tuple, hop: jax.Array) -> tuple:
        k, v, others = kv

        def meet(part: Hop) -> Any:
            def gradients() -> tuple:
                pull = lambda q, k, v: _meet(static, part, q, documents, (k, v, others))  # noqa: E731
                return tuple(array.astype(out.dtype) for array in _pull(pull, (q, k, v), after))

            return gradients

        new = _by_source(static, hop, meet, lambda: (wide(q), wide(k), wide(v)))
        return dq + new[0], (dkv[0] + new[1], dkv[1] + new[2])

    dq, dk, dv = _travel_with_gradients(static, attend, gradients[0], (k, v, documents), gradients[1:])
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
    missing = q.shape[1] - queries.shape[1]
    if missing:
        out = jnp.pad(out, [(0, 0), (missing, 0), (0, 0), (0, 0)])
        log_sum_exp = jnp.pad(log_sum_exp, [(0, 0), (missing, 0), (0, 0)], constant_values=NO_KEY_LOG_SUM_EXP)
    return out, log_sum_exp


def _halves(array: jax.Array, which: slice) -> jax.Array:
    half = array.shape[1] // 2
    return array if which == BOTH else array[:, which.start * half : which.stop * half]


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


def _pull(function: Any, arguments: tuple, after: tuple) -> tuple:
    """Gradients of a part's (out, log_sum_exp) in the whole of which it is a part.

    after: the whole's (out, log_sum_exp) and their cotangents. With weight w = exp(part's log_sum_exp - whole's), the
    whole is the sum of w out over the parts, and its log_sum_exp that of w; so the part's out has the cotangent
    w d_out, and its log_sum_exp w (d_out . (its out - whole's out) + d_log_sum_exp).
    """
    out, log_sum_exp, d_out, d_log_sum_exp = after
    (part_out, part_log_sum_exp), pullback = jax.vjp(function, *arguments)
    weight = jnp.exp(part_log_sum_exp - log_sum_exp)
    weight = jnp.where(part_log_sum_exp <= NO_KEY_LOG_SUM_EXP / 2, 0, weight)  # a part without a key has no say
    lift = jnp.sum(d_out * (part_out - out), axis=-1) + d_log_sum_exp
    return pullback((weight[..., None] * d_out, weight * lift))
