"""The state of a chunked memory over shards of time."""

from functools import partial
from typing import Any

import jax

from lcx.parallel.sequence import pass_state, time_axis
from lcx_kernels.chunked_memory import MemorySummary, chunked_memory_summary


def pass_memory(k: jax.Array, v: jax.Array, initial: Any, **how: Any) -> Any:
    """The memory that comes into this shard; for functions that `kernels.Shard.kernel` calls.

    Args:
      k, v: the shard's, as of `lcx_kernels.chunked_memory.chunked_memory`.
      initial: the state before the sequence, in a form of `chunked_memory`; None is empty.
      how: what else `chunked_memory_summary` is told: log_decay, reset, positions, update, chunk_size, ...

    Returns: the state before this shard, in the same form; `initial` itself where the shard is everything.
    """
    if time_axis() is None:
        return initial
    summarize = partial(chunked_memory_summary, k, v, **how)
    apply = lambda summary, state: summary.state if state is None else summary.apply(state)  # noqa: E731
    exchange = partial(pass_state, then=MemorySummary.then, apply=apply)
    if how.get("update") == "segment_delta":  # what it writes depends on normalisers: these first
        known = None if initial is None else initial._replace(memory=None, open_memory=None)
        found = exchange(summarize, known)
        summarize = partial(summarize, normalizers=(found.normalizer, found.open_normalizer))
    return exchange(summarize, initial)
