"""Sink tokens: the first tokens of each document, which stay in sight of a sliding window.

Xiao et al. 2023, arXiv 2309.17453 (StreamingLLM): the cache holds the first tokens and the last ones, and a key's
position is its place in that cache. So the window's keys keep their distances, and a sink comes no farther away than
the cache is long. Here that is one more set of keys for each query, merged with the window's by its log-sum-exp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP


class SinkKeys(NamedTuple):
    """The sinks of each query's document, and of the document that the chunk ends in."""

    key: jax.Array  # [batch, time, count, kv_heads, K], turned to their own positions, 0 ... count - 1
    value: jax.Array  # [batch, time, count, kv_heads, V]
    last_key: jax.Array  # [batch, count, kv_heads, K]; zeros for sinks that have not come yet
    last_value: jax.Array

    @classmethod
    def find(
        cls,
        key: jax.Array,
        value: jax.Array,
        past_key: jax.Array | None,
        past_value: jax.Array | None,
        positions: jax.Array,
        count: int,
    ) -> "SinkKeys":
        """Looks the sinks up.

        Args:
          key, value: of the chunk, [batch, time, kv_heads, K or V].
          past_key, past_value: of the document that the chunk goes on with, [batch, count, ...]; None: of none.
          positions: int32 [batch, time], in the document.
          count: how many of its first tokens a document keeps.
        """
        time = positions.shape[1]
        sink = jnp.arange(count, dtype=jnp.int32)
        # Sink j stands positions - j tokens before its query: in the chunk, before it, or (not seen yet) after.
        place = jnp.arange(time, dtype=jnp.int32)[None, :, None] - positions[:, :, None] + sink
        slot = jnp.where(place < 0, sink, count + jnp.minimum(place, time - 1))
        missing = place[:, -1] >= time

        def take(tokens: jax.Array, past: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            past = jnp.zeros_like(tokens, shape=(tokens.shape[0], count, *tokens.shape[2:])) if past is None else past
            both = jnp.concatenate([past.astype(tokens.dtype), tokens], axis=1)
            found = jax.vmap(lambda row, slots: row[slots])(both, slot)
            return found, jnp.where(missing[:, :, None, None], 0, found[:, -1])

        (key, last_key), (value, last_value) = take(key, past_key), take(value, past_value)
        return cls(key, value, last_key, last_value)


def add_sinks(
    out: jax.Array, log_sum_exp: jax.Array, query: jax.Array, sinks: SinkKeys, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges the sinks into the results of attention over other keys.

    Args:
      out: [batch, time, heads, V].
      log_sum_exp: [batch, time, heads], at least float32.
      query: [batch, time, heads, K], turned to the position that it has in the cache.
      sinks: their keys and values.
      seen: bool [batch, time, count], which sinks a query sees besides the other keys.

    Returns: (out in the dtype of log_sum_exp, the log-sum-exp over all keys).
    """
    dtype = log_sum_exp.dtype
    batch, time, heads, width = query.shape
    kv_heads = sinks.key.shape[3]
    query = query.reshape(batch, time, kv_heads, heads // kv_heads, width).astype(dtype)
    scores = jnp.einsum("btngk,btcnk->btngc", query, sinks.key.astype(dtype)) * width**-0.5
    scores = scores.reshape(batch, time, heads, -1)
    scores = jnp.where(seen[:, :, None], scores, NO_KEY_LOG_SUM_EXP)
    total = jnp.logaddexp(log_sum_exp, jax.nn.logsumexp(scores, axis=-1))
    weights = jnp.where(seen[:, :, None], jnp.exp(scores - total[..., None]), 0)
    weights = weights.reshape(batch, time, kv_heads, heads // kv_heads, -1)
    far = jnp.einsum("btngc,btcnv->btngv", weights, sinks.value.astype(dtype))
    return out.astype(dtype) * jnp.exp(log_sum_exp - total)[..., None] + far.reshape(out.shape), total
