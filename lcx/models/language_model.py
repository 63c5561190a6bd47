"""The language model: embedding, a scanned stack of pre-norm residual layers, head.

One forward serves training, prefill and decoding; what differs is the state that it starts from.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.config import ModelConfig
from lcx.errors import UserError
from lcx.layers.embedding import Embedding
from lcx.layers.initializers import SCHEMES
from lcx.layers.norm import RMSNorm
from lcx.mixers import Context, ModelDims
from lcx.models.pattern import parse_pattern
from lcx.models.stack import Stack
from lcx.parallel.sharding import constrain
from lcx_kernels.backends import target_platform

STREAM = ("batch", "time", None)


class LanguageModel(nnx.Module):
    """A pattern of mixers between an embedding and a head.

    Args:
      config: the `model` section of a config, as a dataclass, a ConfigDict or a mapping.
      rngs: where parameters are drawn from.

    Raises UserError for a config that cannot be built.
    """

    def __init__(self, config: ModelConfig | Mapping[str, Any], rngs: nnx.Rngs):
        config = ModelConfig.from_dict(config)
        pattern = parse_pattern(config.pattern, config.mixers)
        dims = model_dims(config, sublayers=config.periods * sum(len(names) for names in pattern))
        # muP: embeddings start as at the base width and learn as fast; what falls with the width is the final norm, by
        # which the logits are multiplied.
        scheme, width, ratio = SCHEMES[config.init], config.d_model, dims.width_ratio
        embedding_init = scheme.embedding(width / ratio, width / ratio, dims.sublayers)
        self.residual_dtype = jnp.promote_types(config.residual_dtype, dims.compute_dtype)
        self.compute_dtype = dims.compute_dtype
        self.embedding = Embedding(config.vocab_size, width, embedding_init, rngs, dtype=dims.param_dtype)
        self.stack = Stack(pattern, config.mixers, config.remat_policies, config.periods, dims, rngs)
        self.norm = RMSNorm(width, config.norm_eps, rngs, dtype=dims.param_dtype, multiplier=1 / ratio)
        if not config.tie_embeddings:
            head_init = scheme.dense(width / ratio, width / ratio, dims.sublayers)
            self.head = Embedding(config.vocab_size, width, head_init, rngs, dtype=dims.param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        state: dict | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict, dict]:
        """The logits of each token's successor.

        Args:
          tokens: int32 [batch, time].
          state: what the tokens before left behind (`init_state`, or a state that this returned). None is empty, with
            room for these tokens and no more.
          positions: int32 [batch, time], the index of each token in its document; where it is 0 a document starts. None
            continues the state's position and restarts where segment_ids change.
          segment_ids: int32 [batch, time], the documents of the row from 1, 0 for padding. None: one document, or what
            the positions say.

        Returns: (logits [batch, time, vocab_size], at least float32; the state after the last token; aux, the stacked
          metrics and losses of the mixers by layer).

        Raises ValueError where positions and segment_ids disagree, or the state has no room for the tokens.
        """
        hidden, state, aux = self.hidden(tokens, state, positions, segment_ids)
        return self.logits(hidden), state, aux

    def hidden(
        self,
        tokens: jax.Array,
        state: dict | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, dict, dict]:
        """Like a call, but the normed hidden states [batch, time, d_model] in the compute dtype instead of logits."""
        batch, time = tokens.shape
        context = make_context(tokens.shape, state, positions, segment_ids)
        layers = None if state is None else state["layers"]
        fits = _check_capacity(self.stack.capacity(layers), context.length, time)
        with jax.named_scope("embedding"):
            x = constrain(self.embedding(tokens, self.residual_dtype), STREAM)
        x, layers, aux = self.stack(x, layers, context)
        hidden = constrain(self.norm(x).astype(self.compute_dtype), STREAM)
        if fits is not None:
            hidden = jnp.where(fits[:, None, None], hidden, jnp.nan)
        length = context.length + jnp.int32(time)
        return hidden, {"position": context.positions[:, -1] + 1, "length": length, "layers": layers}, aux

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., d_model] to [..., vocab_size], at least float32: the tied embedding or a head of its own."""
        return self.output.logits(hidden)

    @property
    def output_table(self) -> jax.Array:
        """[vocab_size, d_model], of which each row scores a token: the embedding's, or that of a head of its own."""
        return self.output.table[...]

    @property
    def output(self) -> Embedding:
        return self.head if hasattr(self, "head") else self.embedding

    def init_state(self, batch_size: int, max_length: int) -> dict:
        """An empty state with room for max_length tokens a row: {"position", "length": int32 [batch], "layers"}."""
        position, length = (jnp.zeros((batch_size,), jnp.int32) for _ in range(2))
        return {"position": position, "length": length, "layers": self.stack.init_state(batch_size, max_length)}

    def flops(self, tokens: int) -> int | None:
        """Forward FLOPs of one document of `tokens` tokens, logits of every token included.

        What counts is said in `Mixer.flops`; a step of training is about three times this, without what remat computes
        again. Costs no memory, also on a model without values. None if a mixer does not know its own.
        """
        stack = self.stack.flops(tokens)
        return None if stack is None else stack + self.output.flops(tokens)


def model_dims(config: ModelConfig, sublayers: int) -> ModelDims:
    """What mixers are told of the model. Raises UserError for float64 where JAX computes in 32 bits."""
    compute = config.compute_dtype
    if compute == "auto":
        compute = "float32" if target_platform() == "cpu" else "bfloat16"
    for field, dtype in (("param", config.param_dtype), ("compute", compute), ("residual", config.residual_dtype)):
        if dtype == "float64" and not jax.config.jax_enable_x64:
            raise UserError(f"model.{field}_dtype=float64 needs 64-bit JAX; set JAX_ENABLE_X64=1 or choose float32.")
    return ModelDims(
        d_model=config.d_model,
        sublayers=sublayers,
        norm_eps=config.norm_eps,
        init=config.init,
        param_dtype=jnp.dtype(config.param_dtype),
        compute_dtype=jnp.dtype(compute),
        mup_base_width=config.mup_base_width,
    )


def make_context(
    shape: tuple[int, int], state: dict | None, positions: jax.Array | None, segment_ids: jax.Array | None
) -> Context:
    """Completes what a caller says of a chunk's tokens; see `LanguageModel.__call__`.

    Returns a Context of int32 arrays. Raises ValueError where positions and segment_ids disagree on a document's start.
    """
    batch, time = shape
    zeros = jnp.zeros((batch,), jnp.int32)
    first = zeros if state is None else state["position"]
    length = zeros if state is None else state["length"]
    if positions is not None and segment_ids is not None:
        _check_agreement(positions, segment_ids)
    if positions is None:
        index = jnp.arange(time, dtype=jnp.int32)[None]
        starts = jnp.zeros(shape, bool) if segment_ids is None else _changes(jnp.asarray(segment_ids))
        last_start = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
        positions = jnp.where(last_start < 0, first[:, None] + index, index - last_start)
    positions = jnp.asarray(positions, jnp.int32)
    if segment_ids is None:
        starts = (positions == 0).at[:, 0].set(True)
        segment_ids = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    return Context(positions, jnp.asarray(segment_ids, jnp.int32), length)


def _changes(segment_ids: jax.Array) -> jax.Array:
    """bool [batch, time]: the token's segment differs from the one before it in the chunk."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def _check_agreement(positions: jax.Array, segment_ids: jax.Array) -> None:
    if isinstance(positions, jax.core.Tracer) or isinstance(segment_ids, jax.core.Tracer):
        return
    positions, segment_ids = np.asarray(positions), np.asarray(segment_ids)
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    wrong = np.argwhere((positions[:, 1:] == 0) != changed)
    if len(wrong):
        row, time = wrong[0]
        raise ValueError(
            f"positions and segment_ids disagree at row {row}, token {time + 1}: a document starts exactly where "
            f"positions is 0 and segment_ids changes; got position {positions[row, time + 1]}, segments "
            f"{segment_ids[row, time]} and {segment_ids[row, time + 1]}"
        )


def _check_capacity(capacity: int | None, length: jax.Array, time: int) -> jax.Array | None:
    """bool [batch]: the row's tokens fit; None where nothing can overflow. Raises ValueError where that is known."""
    if capacity is None:
        return None
    fits = length + time <= capacity
    if isinstance(fits, jax.core.Tracer):
        return fits
    if not bool(fits.all()):
        raise ValueError(
            f"the state has room for {capacity} tokens and holds {int(length.max())}; {time} more do not fit: "
            "start from init_state with a larger max_length"
        )
    return None
