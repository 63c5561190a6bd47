"""What every backend receives: checked arrays, and what is known of the call while tracing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Arguments(NamedTuple):
    """The arrays of a call; None where absent.

    q [batch, time, heads, K], k [batch, keys, kv_heads, K] and v [batch, keys, kv_heads, V] have one floating dtype.
    Indices and segments are int32 [batch, time] for queries and [batch, keys] for keys. Indices are given if and only
    if ``Static.offset`` is None, segments both or neither.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    query_index: jax.Array | None
    key_index: jax.Array | None
    query_segment: jax.Array | None
    key_segment: jax.Array | None


class Static(NamedTuple):
    """What is known of a call while tracing; see ``api.attention``.

    ``offset``: query t has the index offset + t and key j the index j; None where indices are arrays.
    """

    causal: bool
    window: int | None
    offset: int | None
    scale: float
    softcap: float | None
    chunk_size: int | None


def delta_of(results: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What each query's softmax takes off the gradients of its scores, p (v.d_out - delta), at least float32.

    The gradient of out gives out.d_out, and that of the log-sum-exp p itself. ``results`` and ``cotangents``: of out
    and log_sum_exp.
    """
    (out, log_sum_exp), (d_out, d_log_sum_exp) = results, cotangents
    return jnp.sum(out.astype(log_sum_exp.dtype) * d_out.astype(log_sum_exp.dtype), axis=-1) - d_log_sum_exp
