"""Infini-attention: attention within a segment, and a compressive memory of all segments before it.

Munkhdalai et al. 2024, arXiv 2404.07143. Segments are counted per document, so that a packed document is the document
alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.initializers import Constant
from lcx.mixers.base import Aux, Context, ModelDims, State, check_backend
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
from lcx.parallel.memory import pass_memory
from lcx.parallel.sequence import halo, last
from lcx.params import param
from lcx.schema import limited
from lcx_kernels.attention import attention, select_backend
from lcx_kernels.chunked_memory import SegmentState, chunked_memory
from lcx_kernels.chunked_memory import select_backend as select_memory_backend

MATRIX, VECTOR = ("batch", "kv_heads", None, None), ("batch", "kv_heads", None)
STATE_AXES = SegmentState(MATRIX, VECTOR, MATRIX, VECTOR)


@dataclass(frozen=True, kw_only=True)
class InfiniOptions(HeadOptions):
    """Options of `type: "infini"`."""

    segment_length: int = limited(2048, minimum=1)  # tokens
    update: Literal["linear", "segment_delta"] = "linear"  # what a segment writes; delta: what memory lacks of it
    gate_learning_rate: float = limited(0.01, minimum=0)  # the peak itself: with the model's own, gates hardly move


class Infini(GroupedHeads):
    """y = sigmoid(gate) memory + (1 - sigmoid(gate)) local, one gate a query head, one memory a key and value head.

    Rotary positions turn the local part only: the memory's queries and keys are elu + 1 of what was projected. The
    state is the memory, what the open segment has written so far, and the last segment_length - 1 keys and values.
    """

    Options = InfiniOptions
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "linear": {"num_heads": 4, "num_kv_heads": 2, "segment_length": 4},
        "segment_delta": {"num_heads": 4, "num_kv_heads": 2, "segment_length": 4, "update": "segment_delta"},
    }

    positive_state: ClassVar[frozenset[str]] = frozenset({"normalizer", "open_normalizer"})
    recurrent_state: ClassVar[frozenset[str]] = frozenset({"memory"})

    def __init__(self, options: InfiniOptions, dims: ModelDims, rngs: nnx.Rngs):
        super().__init__(options, dims, rngs, select_backend)
        check_backend(select_memory_backend, options.backend)
        rate = options.gate_learning_rate
        self.gate = param(
            rngs,
            (options.num_heads,),
            ("heads",),
            Constant(0.0),
            dtype=dims.param_dtype,
            decay=False,
            learning_rate=rate,
            absolute=True,
        )

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        options, past = self.options, state or {}
        query, key, value = self.project(x)

        def local(
            query, key, value, turned_query, turned_key, gate, positions, lookback, document,
            key_tail, value_tail, document_tail, **past,
        ):  # fmt: skip
            recent, key_tail = halo(turned_key, key_tail, options.segment_length - 1)
            recent_value, value_tail = halo(value, value_tail, options.segment_length - 1)
            recent_document, _ = halo(document, document_tail, options.segment_length - 1)
            near, _ = attention(
                turned_query,
                recent,
                recent_value,
                window=options.segment_length,
                segment_ids=(document, recent_document),
                offset=recent.shape[1] - query.shape[1],
                backend=options.backend,
            )
            query, key = jax.nn.elu(query) + 1, jax.nn.elu(key) + 1
            how = dict(update=options.update, read="exclusive", normalize=True, chunk_size=options.segment_length)
            how |= dict(positions=positions, reset=lookback == 0, backend=options.backend)
            memory = None if past["memory"] is None else SegmentState(**past)
            memory = pass_memory(key, value, memory, **how)
            far, memory = chunked_memory(query, key, value, initial_state=memory, **how)
            opened = jax.nn.sigmoid(gate)[:, None]
            out = opened * far + (1 - opened) * near.astype(far.dtype)
            return (out.astype(turned_query.dtype), key_tail, value_tail, *last(memory))

        gate = self.gate[...].astype(self.dims.state_dtype)
        tails = {f"{name}_tail": past.get(name) for name in ("key", "value")}
        memory = {name: past.get(name) for name in SegmentState._fields}
        # To attention, a segment is a document.
        within = jnp.minimum(context.lookback, context.positions % options.segment_length)
        segments = {"document": documents(within)}
        segments["document_tail"] = tail_documents(within, options.segment_length - 1) if past else None
        turned = {
            "turned_query": self.rotated(query, context.positions),
            "turned_key": self.rotated(key, context.positions),
        }
        axes = dict(query=QUERY, turned_query=QUERY, key=KEY, turned_key=KEY, value=KEY, gate=("heads",))
        axes |= dict(positions=TOKEN, lookback=TOKEN, key_tail=TAIL, value_tail=TAIL) | STATE_AXES._asdict()
        axes |= dict(document=TOKEN, document_tail=TAIL[:2])
        shapes = self._state_shapes(x.shape[0])
        out, *held = context.shard.kernel(
            local,
            dict(query=query, key=key, value=value, gate=gate, positions=context.positions, lookback=context.lookback)
            | turned
            | segments
            | tails
            | memory,
            axes,
            ((query.shape, QUERY), (shapes["key"], TAIL), (shapes["value"], TAIL))
            + tuple((shapes[name], axes[name]) for name in SegmentState._fields),
        )
        state = dict(zip(("key", "value", *SegmentState._fields), held, strict=True))
        squares = jnp.sum(jnp.square(jax.lax.stop_gradient(state["memory"])), axis=(2, 3))
        metrics = {
            "gate": jax.lax.stop_gradient(jax.nn.sigmoid(gate)),  # [heads]
            "memory_norm": jnp.mean(jnp.sqrt(squares), axis=0),  # [kv_heads]
        }
        return self.output(out), state, {"metrics": metrics}

    def _state_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        kv_heads, width = self.kv_shape
        tail = (batch_size, self.options.segment_length - 1, kv_heads, width)
        matrix = (batch_size, kv_heads, width, width)
        return {"key": tail, "value": tail} | SegmentState(matrix, matrix[:3], matrix, matrix[:3])._asdict()

    def init_state(self, batch_size: int, max_length: int) -> State:
        del max_length
        tail = ("key", "value")
        dtype = lambda name: self.dims.compute_dtype if name in tail else self.dims.state_dtype  # noqa: E731
        return {name: jnp.zeros(shape, dtype(name)) for name, shape in self._state_shapes(batch_size).items()}

    def flops(self, tokens: int) -> int:
        kv_heads, width = self.kv_shape
        length = self.options.segment_length
        whole, rest = divmod(tokens, length)
        pairs = whole * visible_pairs(length, None) + visible_pairs(rest, None)
        access = 2 * width * (width + 1)  # one head reads or writes a memory and its normaliser
        readers = self.options.num_heads + kv_heads * (self.options.update == "segment_delta")
        memory = access * (kv_heads * tokens + readers * max(0, tokens - length))
        return self.projection_flops(tokens) + self.pair_flops(pairs) + memory
