"""Sink tokens: the first tokens of each document, which stay in sight of a sliding window.

Xiao et al. 2023, arXiv 2309.17453 (StreamingLLM): the cache holds the first tokens and the last ones, and a key's
position is its place in that cache. So the window's keys keep their distances, and a sink comes no farther away than
the cache is long. Here that is one more set of keys for each query, merged with the window's by its log-sum-exp.
"""

import jax
import jax.numpy as jnp

from lcx.parallel.sequence import pass_state
from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP

Pair = tuple[jax.Array, jax.Array]


def find_sinks(
    key: jax.Array, value: jax.Array, past_key: jax.Array, past_value: jax.Array, positions: jax.Array
) -> tuple[Pair, Pair]:
    """The sinks of each query's document, and of the document that the chunk ends in.

    Args:
      key, value: of the chunk, [batch, time, kv_heads, K or V], keys turned to their positions.
      past_key, past_value: of the document that the chunk goes on with, [batch, count, kv_heads, K or V]: its first
        `count` tokens, as far as they have come.
      positions: int32 [batch, time], in the document.

    Returns: (key and value of each query's sinks, [batch, time, count, kv_heads, ...], of no meaning for sinks that are
      still in sight or have not come; the next past_key and past_value, zeros for what has not come).
    """
    time, count = positions.shape[1], past_key.shape[1]
    sink = jnp.arange(count, dtype=jnp.int32)
    # Sink j stands positions - j tokens before its query: in the chunk, before it, or (not seen yet) after.
    place = jnp.arange(time, dtype=jnp.int32)[None, :, None] - positions[:, :, None] + sink
    slot = jnp.where(place < 0, sink, count + jnp.minimum(place, time - 1))
    missing = (place[:, -1] >= time)[:, :, None, None]

    def take(tokens: jax.Array, past: jax.Array) -> Pair:
        both = jnp.concatenate([past.astype(tokens.dtype), tokens], axis=1)
        found = jax.vmap(lambda row, slots: row[slots])(both, slot)
        return found, jnp.where(missing, 0, found[:, -1])

    (key, last_key), (value, last_value) = take(key, past_key), take(value, past_value)
    return (key, value), (last_key, last_value)


def pass_sinks(
    key: jax.Array, value: jax.Array, past_key: jax.Array, past_value: jax.Array, positions: jax.Array
) -> Pair:
    """The past keys and values for this shard of time, arguments as of `find_sinks`; those given are the sequence's."""

    def summarize() -> tuple[jax.Array, Pair]:
        _, held = find_sinks(key, value, jnp.zeros_like(past_key), jnp.zeros_like(past_value), positions)
        sink = jnp.arange(past_key.shape[1], dtype=jnp.int32)
        before = positions[:, -1:] - sink >= positions.shape[1]  # the last document's sink came before this shard
        return before[:, :, None, None], held

    def apply(found: tuple[jax.Array, Pair], past: Pair) -> Pair:
        before, held = found
        return tuple(jnp.where(before, a, b.astype(a.dtype)) for a, b in zip(past, held, strict=True))

    def then(early: tuple[jax.Array, Pair], late: tuple[jax.Array, Pair]) -> tuple[jax.Array, Pair]:
        return early[0] & late[0], apply(late, early[1])

    return pass_state(summarize, (past_key, past_value), then, apply)


def hidden_sinks(positions: jax.Array, lookback: jax.Array, window: int, count: int) -> jax.Array:
    """bool [batch, time, count]: the window hides the sink from the query, though its document's start was read.

    Args: positions, lookback: int32 [batch, time], of the queries; window: tokens, the query included; count: of sinks.
    """
    distance = positions[:, :, None] - jnp.arange(count, dtype=jnp.int32)
    return (distance >= window) & (distance <= lookback[:, :, None])


def add_sinks(
    out: jax.Array, log_sum_exp: jax.Array, query: jax.Array, sinks: Pair, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges the sinks into the results of attention over other keys.

    Args:
      out: [batch, time, heads, V].
      log_sum_exp: [batch, time, heads], at least float32.
      query: [batch, time, heads, K], turned to the position that it has in the cache.
      sinks: their keys and values, [batch, time, count, kv_heads, K or V].
      seen: bool [batch, time, count], which sinks a query sees besides the other keys.

    Returns: (out, the log-sum-exp over all keys), both in the dtype of log_sum_exp.
    """
    dtype = log_sum_exp.dtype
    key, value = (array.astype(dtype) for array in sinks)
    batch, time, heads, width = query.shape
    kv_heads = key.shape[3]
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, width).astype(dtype)
    scores = jnp.einsum("btngk,btcnk->btngc", grouped, key) * width**-0.5
    scores = jnp.where(seen[:, :, None], scores.reshape(batch, time, heads, -1), NO_KEY_LOG_SUM_EXP)
    total = jnp.logaddexp(log_sum_exp, jax.nn.logsumexp(scores, axis=-1))
    weights = jnp.where(seen[:, :, None], jnp.exp(scores - total[..., None]), 0)
    weights = weights.reshape(batch, time, kv_heads, heads // kv_heads, -1)
    far = jnp.einsum("btngc,btcnv->btngv", weights, value)
    return out.astype(dtype) * jnp.exp(log_sum_exp - total)[..., None] + far.reshape(out.shape), total
