"""Softmax attention: full or sliding window, grouped heads, rotary positions, sinks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.initializers import Normal
from lcx.mixers.base import Aux, Context, ModelDims, State
from lcx.mixers.heads import (
    KEY,
    QUERY,
    TAIL,
    TOKEN,
    GroupedHeads,
    HeadOptions,
    documents,
    tail_documents,
    visible_pairs,
)
from lcx.mixers.sinks import add_sinks, find_sinks, hidden_sinks, pass_sinks
from lcx.parallel.kernels import attend
from lcx.parallel.sequence import halo, last
from lcx.params import param
from lcx.schema import limited
from lcx_kernels.attention import attention, fold_sinks, select_backend

SINK_LOGIT_STD = 0.02  # of the start, as in gpt-oss


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(HeadOptions):
    """Options of `type: "attention"`."""

    window: int | None = limited(None, minimum=1)  # tokens a query sees, itself included; None: all
    # A logit that joins the softmax's denominator: "logit" is trained, one a head; "zero" is softmax-off-by-one.
    sink: Literal["logit", "zero"] | None = None
    sink_tokens: int = limited(0, minimum=0)  # first tokens of each document that a window does not hide
    # How devices that share a sequence see each other's keys, without a window: round a ring, or each gathers all.
    exchange: Literal["ring", "gather"] = "ring"


class Attention(GroupedHeads):
    """Grouped-query attention over the keys j in [i - window + 1, i], and the document's first `sink_tokens` ones.

    With a window the state is the last window - 1 keys and values, and those of the sinks; without one the state holds
    max_length of them.
    """

    Options = AttentionOptions
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "full": {"num_heads": 4, "num_kv_heads": 2, "sink": "logit"},
        "window": {"num_heads": 4, "num_kv_heads": 1, "window": 5, "qk_norm": True},
        "sink_tokens": {"num_heads": 4, "num_kv_heads": 2, "window": 4, "sink_tokens": 2, "sink": "zero"},
    }

    def __init__(self, options: AttentionOptions, dims: ModelDims, rngs: nnx.Rngs):
        super().__init__(options, dims, rngs, select_backend)
        if options.sink == "logit":
            init = Normal(SINK_LOGIT_STD)
            self.sink_logit = param(rngs, (options.num_heads,), ("heads",), init, dtype=dims.param_dtype, decay=False)

    def query_scale(self, dims: ModelDims, width: int) -> float:
        """Under muP scores are q.k 8 / K, which is q.k / sqrt(K) at K = 64 (arXiv 2203.03466, definition 4.1)."""
        return 8 / math.sqrt(width) if dims.mup_base_width else 1.0

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        query, key, value = self.project(x)
        attend = self._attend_all if self.options.window is None else self._attend_window
        out, state = attend(query, self.rotated(key, context.positions), value, state, context)
        return self.output(out), state, {}

    def _sinks(self) -> jax.Array | None:
        """The logits [heads] in the denominator, at least float32."""
        if self.options.sink is None:
            return None
        if self.options.sink == "zero":
            return jnp.zeros((self.options.num_heads,), self.dims.state_dtype)
        return self.sink_logit[...].astype(self.dims.state_dtype)

    def _attend_window(
        self, query: jax.Array, key: jax.Array, value: jax.Array, state: State | None, context: Context
    ) -> tuple[jax.Array, State]:
        """The keys before the chunk are a halo of window - 1 tokens, whether they come from a state or a neighbour."""
        window, backend, count = self.options.window, self.options.backend, self.options.sink_tokens
        past = state or {}

        def local(
            query, far_query, key, value, positions, lookback, document, sinks,
            key_tail, value_tail, document_tail, sink_key, sink_value,
        ):  # fmt: skip
            keys, key_tail = halo(key, key_tail, window - 1)
            values, value_tail = halo(value, value_tail, window - 1)
            key_document, _ = halo(document, document_tail, window - 1)
            out, log_sum_exp = attention(
                query,
                keys,
                values,
                window=window,
                segment_ids=(document, key_document),
                offset=keys.shape[1] - query.shape[1],
                backend=backend,
            )
            held = ()
            if count:
                sink_key, sink_value = pass_sinks(key, value, sink_key, sink_value, positions)
                first, held = find_sinks(key, value, sink_key, sink_value, positions)
                seen = hidden_sinks(positions, lookback, window, count)
                out, log_sum_exp = add_sinks(out, log_sum_exp, far_query, first, seen)
            if sinks is not None:
                out = fold_sinks(out, log_sum_exp, sinks)
            return (out.astype(query.dtype), key_tail, value_tail, *last(held))

        # A sink stands where the rolling cache has it: never farther than the cache is long.
        nearest = jnp.minimum(context.positions, count + window - 1)
        tail, kept = ((query.shape[0], held, *self.kv_shape) for held in (window - 1, count))
        no_sinks = jnp.zeros(kept, key.dtype) if count else None
        sink_past = lambda name: past.get(name, no_sinks)  # noqa: E731
        results = context.shard.kernel(
            local,
            dict(
                query=self.rotated(query, context.positions),
                far_query=self.rotated(query, nearest) if count else None,
                key=key,
                value=value,
                positions=context.positions,
                lookback=context.lookback,
                document=documents(context.lookback),
                sinks=self._sinks(),
                key_tail=past.get("key"),
                value_tail=past.get("value"),
                document_tail=tail_documents(context.lookback, window - 1) if past else None,
                sink_key=sink_past("sink_key"),
                sink_value=sink_past("sink_value"),
            ),
            dict(query=QUERY, far_query=QUERY, key=KEY, value=KEY, positions=TOKEN, lookback=TOKEN, document=TOKEN)
            | dict(key_tail=TAIL, value_tail=TAIL, document_tail=TAIL[:2], sink_key=TAIL, sink_value=TAIL)
            | dict(sinks=("heads",)),
            ((query.shape, QUERY), (tail, TAIL), (tail, TAIL)) + ((kept, TAIL), (kept, TAIL))[: 2 * bool(count)],
        )
        names = ("key", "value", "sink_key", "sink_value")
        return results[0], dict(zip(names, results[1:], strict=False))

    def _attend_all(
        self, query: jax.Array, key: jax.Array, value: jax.Array, state: State | None, context: Context
    ) -> tuple[jax.Array, State]:
        """The keys are all that the row has had, in the order of the row."""
        backend, exchange = self.options.backend, self.options.exchange
        query, document = self.rotated(query, context.positions), documents(context.lookback)
        arrays = dict(query=query, key=key, value=value, document=document, sinks=self._sinks())
        axes = dict(query=QUERY, key=KEY, value=KEY, document=TOKEN, sinks=("heads",))

        def from_nothing(query, key, value, document, sinks):
            return (attend(query, key, value, document, sinks, exchange=exchange, backend=backend),)

        def from_cache(query, key, value, document, key_document, sinks, row_index):
            slots = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key_document.shape)
            alignment = dict(positions=(row_index, slots), segment_ids=(document, key_document))
            return attention(query, key, value, **alignment, sinks=sinks, backend=backend)[:1]

        if state is not None:  # every device that shares the sequence holds all of the cache
            arrays["key"] = key = _write(state["key"], key, context.length)
            arrays["value"] = value = _write(state["value"], value, context.length)
            held = _held_documents(context, key.shape[1])
            arrays |= dict(key_document=_write(held, document, context.length), row_index=context.row_index)
            axes |= dict(key=TAIL, value=TAIL, key_document=TAIL[:2], row_index=TOKEN)
        local = from_nothing if state is None else from_cache
        (out,) = context.shard.kernel(local, arrays, axes, ((query.shape, QUERY),))
        return out, {"key": key, "value": value}

    def init_state(self, batch_size: int, max_length: int) -> State:
        window, count = self.options.window, self.options.sink_tokens
        held = {"key": max_length, "value": max_length}
        if window is not None:
            held = {"key": window - 1, "value": window - 1}
            held |= {"sink_key": count, "sink_value": count} if count else {}
        shape = lambda tokens: (batch_size, tokens, *self.kv_shape)  # noqa: E731
        return {name: jnp.zeros(shape(tokens), self.dims.compute_dtype) for name, tokens in held.items()}

    def capacity(self, state: State) -> int | None:
        return state["key"].shape[1] if self.options.window is None else None

    def flops(self, tokens: int) -> int:
        window = self.options.window
        pairs = visible_pairs(tokens, window)
        if window is not None:  # sink j is hidden by the window from token j + window on
            pairs += sum(max(0, tokens - sink - window) for sink in range(self.options.sink_tokens))
        return self.projection_flops(tokens) + self.pair_flops(pairs)


def _held_documents(context: Context, capacity: int) -> jax.Array:
    """int32 [batch, capacity]: the documents of the slots before the chunk, as of `tail_documents`; after them, 0."""
    distance = context.length[:, None] - jnp.arange(capacity, dtype=jnp.int32)
    return ((distance > 0) & (distance <= context.lookback[:, :1])).astype(jnp.int32)


def _write(cache: jax.Array, chunk: jax.Array, length: jax.Array) -> jax.Array:
    """Puts chunk [batch, time, ...] into cache [batch, max_length, ...] after each row's `length` tokens.

    Several rows make it a scatter, for which XLA's CPU program copies the cache a few times. A lone row is written
    where it lies, and under a condition, or XLA would write once for the state and once for who reads it.
    """
    chunk = chunk.astype(cache.dtype)
    write = lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0)  # noqa: E731
    if cache.shape[0] > 1:
        return jax.vmap(write)(cache, chunk, length)
    fits = length[0] + chunk.shape[1] <= cache.shape[1]
    return jax.lax.cond(fits, lambda: write(cache[0], chunk[0], length[0])[None], lambda: cache)
