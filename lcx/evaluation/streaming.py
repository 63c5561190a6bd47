"""Streams without end: a model's state carried from chunk to chunk, and full attention with its old tokens evicted.

Eviction is an evaluation mode: it puts a bounded cache under attention that was trained without one.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.models import LanguageModel
from lcx.models.cross_entropy import token_losses
from lcx.params import split


def evicting(model: LanguageModel, window: int, sink_tokens: int) -> LanguageModel:
    """The model with the same parameters, whose full attention keeps the first and the latest tokens alone.

    Xiao et al. 2023, arXiv 2309.17453 (StreamingLLM), section 3.2: the cache holds the document's first `sink_tokens`
    tokens and the `window` latest ones, and positions are places in the cache. Four sinks suit ordinary models; one, a
    model trained with a sink token; none, a model with sink logits. That is the attention that a window and sink tokens
    train, so one mixer serves both.

    Args:
      model: any language model; mixers other than full attention stay as they are.
      window: tokens, the latest one included, at least 1.
      sink_tokens: at least 0.

    Raises UserError where no layer has full attention, or a number is out of range.
    """
    if window < 1 or sink_tokens < 0:
        raise UserError(f"window={window} must be at least 1, and sink_tokens={sink_tokens} at least 0.")
    model, found = nnx.clone(model), 0
    for layer in model.stack.layers.values():
        for mixer in layer.mixers.values():
            if isinstance(mixer, Attention) and mixer.options.window is None:
                mixer.options = dataclasses.replace(mixer.options, window=window, sink_tokens=sink_tokens)
                found += 1
    if not found:
        raise UserError("no layer of this model has full attention: there is nothing to evict.")
    return model


def stream_losses(model: LanguageModel, tokens: np.ndarray, chunk_size: int = 1024) -> np.ndarray:
    """The cross-entropy of each token of one document, read chunk by chunk.

    Memory does not depend on the document's length, unless a layer has full attention.

    Args:
      model: the model.
      tokens: int32 [tokens], at least two.
      chunk_size: tokens read at once.

    Returns: float32 [tokens - 1], in nats, of tokens[1:].
    """
    graphdef, params = split(model)
    inputs, targets = np.asarray(tokens[:-1], np.int32), np.asarray(tokens[1:], np.int32)
    state, losses = model.init_state(1, len(inputs)), []
    for start in range(0, len(inputs), chunk_size):
        piece = slice(start, start + chunk_size)
        found, state = _score(graphdef, params, state, inputs[None, piece], targets[None, piece])
        losses.append(found)
    return np.concatenate([np.asarray(found[0]) for found in losses])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score(
    graphdef: nnx.GraphDef, params: dict, state: dict, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, dict]:
    model = nnx.merge(graphdef, params)
    hidden, state, _ = model.hidden(tokens, state)
    losses, _ = token_losses(model.logits, hidden, targets, tokens.shape[1])
    return losses.astype(jnp.float32), state
