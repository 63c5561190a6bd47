"""Softmax attention: full or sliding window, grouped heads, rotary positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.errors import UserError
from lcx.layers.norm import RMSNorm
from lcx.layers.rotary import rotate
from lcx.mixers.base import Aux, Context, Mixer, ModelDims, State, check_backend
from lcx.parallel.sequence import halo
from lcx.schema import limited
from lcx_kernels.attention import attention, select_backend

QUERY = ("batch", "time", "heads", None)
KEY = ("batch", "time", "kv_heads", None)
TOKEN = ("batch", "time")


@dataclass(frozen=True)
class AttentionOptions:
    """Options of `type: "attention"`."""

    num_heads: int = limited(minimum=1)
    num_kv_heads: int | None = limited(None, minimum=1)  # None: as many as query heads
    head_dim: int | None = limited(None, minimum=1)  # None: d_model / num_heads
    window: int | None = limited(None, minimum=1)  # tokens a query sees, itself included; None: all
    rope_base: float | None = 10_000.0  # None: no positions
    qk_norm: bool = False  # RMSNorm over each query and key head before the rotation
    backend: str = "auto"


class Attention(Mixer):
    """Grouped-query attention: query head h reads key/value head h // (num_heads / num_kv_heads).

    With a window w a query sees the keys j in [i - w + 1, i] and the state is the last w - 1 keys and values; without
    one the state holds max_length of them.
    """

    Options = AttentionOptions
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "full": {"num_heads": 4, "num_kv_heads": 2},
        "window": {"num_heads": 4, "num_kv_heads": 1, "window": 5, "qk_norm": True},
    }

    def __init__(self, options: AttentionOptions, dims: ModelDims, rngs: nnx.Rngs):
        heads = options.num_heads
        kv_heads = options.num_kv_heads or heads
        if options.head_dim is None and dims.d_model % heads:
            raise UserError(
                f"num_heads={heads} does not divide d_model={dims.d_model}; set head_dim or another num_heads."
            )
        if heads % kv_heads:
            raise UserError(f"num_kv_heads={kv_heads} does not divide num_heads={heads}.")
        width = options.head_dim or dims.d_model // heads
        if options.rope_base is not None and width % 2:
            raise UserError(
                f"head_dim={width} is odd, but rotary positions turn pairs; use an even one or rope_base=none."
            )
        check_backend(select_backend, options.backend)
        self.options, self.dims = options, dims
        self.kv_shape = (kv_heads, width)
        self.query = dims.dense(dims.d_model, (heads, width), ("d_model", "heads", None), rngs)
        self.key = dims.dense(dims.d_model, (kv_heads, width), ("d_model", "kv_heads", None), rngs)
        self.value = dims.dense(dims.d_model, (kv_heads, width), ("d_model", "kv_heads", None), rngs)
        self.output = dims.output((heads, width), ("heads", None, "d_model"), rngs)
        if options.qk_norm:
            self.query_norm = RMSNorm(width, dims.norm_eps, rngs, dtype=dims.param_dtype)
            self.key_norm = RMSNorm(width, dims.norm_eps, rngs, dtype=dims.param_dtype)

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.options.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.options.rope_base is not None:
            query = rotate(query, context.positions, self.options.rope_base)
            key = rotate(key, context.positions, self.options.rope_base)
        attend = self._attend_all if self.options.window is None else self._attend_window
        out, state = attend(query, key, value, state, context)
        return self.output(out), state, {}

    def _attend_window(
        self, query: jax.Array, key: jax.Array, value: jax.Array, state: State | None, context: Context
    ) -> tuple[jax.Array, State]:
        """The keys before the chunk are a halo of window - 1 tokens, whether they come from a state or a neighbour."""
        window, backend = self.options.window, self.options.backend
        past = state or {"key": None, "value": None}

        def local(query, key, value, lookback, key_tail, value_tail):
            key, key_tail = halo(key, key_tail, window - 1)
            value, value_tail = halo(value, value_tail, window - 1)
            offset = key.shape[1] - query.shape[1]
            out, _ = attention(query, key, value, window=window, lookback=lookback, offset=offset, backend=backend)
            return out, key_tail, value_tail

        tail_shape = (query.shape[0], window - 1, *self.kv_shape)
        tail_axes = ("batch", None, "kv_heads", None)
        out, key, value = context.shard.kernel(
            local,
            dict(
                query=query,
                key=key,
                value=value,
                lookback=context.lookback,
                key_tail=past["key"],
                value_tail=past["value"],
            ),
            dict(query=QUERY, key=KEY, value=KEY, lookback=TOKEN, key_tail=tail_axes, value_tail=tail_axes),
            ((query.shape, QUERY), (tail_shape, tail_axes), (tail_shape, tail_axes)),
        )
        return out, {"key": key, "value": value}

    def _attend_all(
        self, query: jax.Array, key: jax.Array, value: jax.Array, state: State | None, context: Context
    ) -> tuple[jax.Array, State]:
        """The keys are all that the row has had, in the order of the row."""
        backend = self.options.backend
        arrays = dict(query=query, lookback=context.lookback)
        axes = dict(query=QUERY, lookback=TOKEN, key=KEY, value=KEY, row_index=TOKEN)
        if state is not None:
            key = _write(state["key"], key, context.length)
            value = _write(state["value"], value, context.length)
            arrays["row_index"] = context.row_index

        def local(query, key, value, lookback, row_index=None):
            if row_index is None:
                return attention(query, key, value, lookback=lookback, offset=0, backend=backend)[:1]
            slots = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), (key.shape[0], key.shape[1]))
            return attention(query, key, value, lookback=lookback, positions=(row_index, slots), backend=backend)[:1]

        (out,) = context.shard.kernel(local, arrays | dict(key=key, value=value), axes, ((query.shape, QUERY),))
        return out, {"key": key, "value": value}

    def init_state(self, batch_size: int, max_length: int) -> State:
        held = max_length if self.options.window is None else self.options.window - 1
        shape = (batch_size, held, *self.kv_shape)
        return {name: jnp.zeros(shape, self.dims.compute_dtype) for name in ("key", "value")}

    def capacity(self, state: State) -> int | None:
        return state["key"].shape[1] if self.options.window is None else None


def _write(cache: jax.Array, chunk: jax.Array, length: jax.Array) -> jax.Array:
    """Puts chunk [batch, time, ...] into cache [batch, max_length, ...] after each row's `length` tokens."""
    write = lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0)  # noqa: E731
    return jax.vmap(write)(cache, chunk.astype(cache.dtype), length)
