"""Streams without end: a model's state carried from chunk to chunk, and full attention with its old tokens evicted.

Every suite reads through `stream` or writes through `write`, so that none needs more memory for a longer text, unless a
layer has full attention.

Eviction is an evaluation mode: it puts a bounded cache under attention that was trained without one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.models import LanguageModel
from lcx.models.cross_entropy import token_losses
from lcx.models.generate import generate
from lcx.parallel.sharding import constrain
from lcx.params import split

LOGITS = 128  # tokens of a row whose logits exist at once
SHORT = 256  # tokens read at once of prompts that one chunk could hold: few shapes for many lengths


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


@dataclass(frozen=True)
class Piece:
    """What a model makes of one chunk of rows of tokens."""

    start: int  # of the first token that is read, in the row
    losses: np.ndarray  # float32 [batch, chunk]: nats of tokens[:, start + 1 :]
    predictions: np.ndarray | None  # int32 [batch, chunk]: the likeliest tokens there
    state: dict  # after the chunk; gone when the next piece is asked for
    metrics: dict  # of the mixers, by layer, mixer and name, stacked over periods


def stream(
    model: LanguageModel, tokens: np.ndarray, chunk_size: int, predict: bool = False, score: bool = True
) -> Iterator[Piece]:
    """Reads rows of tokens chunk by chunk, each row one document. Memory does not depend on the rows' length, unless a
    layer has full attention.

    Args:
      model: the model.
      tokens: int32 [batch, time], at least two a row.
      chunk_size: tokens read at once. The last chunk is filled up, so that one program reads them all; what a state
        holds of the filling is seen by nobody but in the last piece.
      predict: give the likeliest tokens too.
      score: give losses; without, they are empty, and the head is not run.
    """
    graphdef, params = split(model)
    inputs, targets = (np.asarray(side, np.int32) for side in (tokens[:, :-1], tokens[:, 1:]))
    batch, time = inputs.shape
    size = min(chunk_size, time)
    count = -(-time // size)
    state = model.init_state(batch, count * size)
    for start in range(0, time, size):
        left = min(size, time - start)
        fill = ((0, 0), (0, size - left))
        piece = [np.pad(side[:, start : start + left], fill) for side in (inputs, targets)]
        found, state, metrics = _read(graphdef, params, state, *piece, predict, score)
        losses, predictions = (None if side is None else np.asarray(side)[:, :left] for side in found)
        yield Piece(start, losses, predictions, state, metrics)


def row_losses(model: LanguageModel, tokens: np.ndarray, chunk_size: int) -> np.ndarray:
    """The cross-entropy of each token of rows of tokens, read chunk by chunk.

    tokens: int32 [batch, time]. Returns: float32 [batch, time - 1], in nats, of tokens[:, 1:].
    """
    return np.concatenate([piece.losses for piece in stream(model, tokens, chunk_size)], axis=1)


def stream_losses(model: LanguageModel, tokens: np.ndarray, chunk_size: int = 1024) -> np.ndarray:
    """`row_losses` of one document: int32 [tokens] to float32 [tokens - 1]."""
    return row_losses(model, np.asarray(tokens)[None], chunk_size)[0]


def write(
    model: LanguageModel, prompts: Sequence[np.ndarray], max_tokens: int, chunk_size: int, batch_size: int
) -> list[np.ndarray]:
    """What a model writes after each prompt, the likeliest token each time: int32 [max_tokens] each.

    Args:
      prompts: int32 [time] each, of any lengths; those of one batch should not differ much.
      chunk_size: tokens of a prompt read at once.
      batch_size: prompts continued together. The last batch is filled up, so that one program serves all.
    """
    if max(map(len, prompts), default=0) <= chunk_size:
        chunk_size = min(chunk_size, SHORT)
    written: list[np.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start : start + batch_size])
        filled = chosen + [chosen[-1]] * (min(batch_size, len(prompts)) - len(chosen))
        tokens = generate(model, filled, max_tokens, temperature=0.0, chunk_size=chunk_size)
        written += list(np.stack(list(tokens), axis=1)[: len(chosen)])
    return written


@partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def _read(
    graphdef: nnx.GraphDef,
    params: dict,
    state: dict,
    tokens: jax.Array,
    targets: jax.Array,
    predict: bool,
    score: bool,
) -> tuple[tuple[jax.Array | None, jax.Array | None], dict, dict]:
    model = nnx.merge(graphdef, params)
    hidden, state, aux = model.hidden(tokens, state)
    losses, predictions = None, None
    if score:
        losses, _ = token_losses(model.output_table, hidden, targets, LOGITS)
        losses = constrain(losses.astype(jnp.float32), (None, None))  # every process reads them
    if predict:
        likeliest = jax.lax.map(lambda row: jnp.argmax(model.logits(row[None]), axis=-1)[0], hidden)
        predictions = constrain(likeliest.astype(jnp.int32), (None, None))
    metrics = {key: {name: mixer.get("metrics", {}) for name, mixer in mixers.items()} for key, mixers in aux.items()}
    return (losses, predictions), state, metrics
