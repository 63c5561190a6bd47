"""Generation: prefill and decoding over the model's one forward."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.models.language_model import LanguageModel
from lcx.params import split


def generate(
    model: LanguageModel,
    prompts: np.ndarray | Sequence[np.ndarray],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chunk_size: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts, token by token, all of them in one batch.

    A prompt's continuation does not depend on the prompts beside it, except for what a draw gives. Memory does not grow
    with the tokens unless the model has full attention, whose state holds them all: everything else keeps a state of
    fixed size, and a prompt is read in chunks.

    Args:
      model: the model.
      prompts: int32 [batch, time], or a sequence of integer arrays [time] of different lengths, none of them empty.
      max_tokens: how many tokens to generate for each.
      temperature: what logits are divided by; 0 takes the most likely token.
      top_k: sample among the k most likely tokens; 0 among all.
      top_p: sample among the fewest tokens whose probabilities sum to at least this (nucleus sampling, Holtzman et
        al., arXiv 1904.09751), after top_k.
      seed: of the draws; the same seed gives the same tokens.
      chunk_size: how many tokens of a prompt are read at once, which does not change what is written; None: all.

    Returns an iterator of int32 [batch], the next token of each prompt. Raises ValueError for prompts or a chunk_size
    that are none.
    """
    prompts = [np.asarray(prompt) for prompt in prompts]
    for prompt in prompts:
        if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"a prompt is an array of integers [time], not {prompt.dtype}{list(prompt.shape)}")
    if not prompts:
        raise ValueError("there is no prompt to continue")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for whole prompts, not {chunk_size}")
    settings = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    return _generate(model, left_pad(prompts, chunk_size), max_tokens, jax.random.key(seed), settings)


def left_pad(prompts: Sequence[np.ndarray], chunk_size: int | None) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The prompts [time] as rows that end together, in chunks of one length: (tokens, positions, segment_ids) of each.

    All are int32 [batch, chunk]; a chunk is as long as the longest prompt where that is less than chunk_size. What
    stands before a prompt is padding: segment 0, a document of its own, whose positions count from the row's head. A
    prompt's positions begin at 0.
    """
    longest = max(len(prompt) for prompt in prompts)
    size = min(chunk_size or longest, longest)
    time = -(-longest // size) * size
    tokens, segment_ids = np.zeros((2, len(prompts), time), np.int32)
    positions = np.tile(np.arange(time, dtype=np.int32), (len(prompts), 1))
    for row, prompt in enumerate(prompts):
        begin = time - len(prompt)
        tokens[row, begin:], segment_ids[row, begin:] = prompt, 1
        positions[row, begin:] -= begin
    return [
        tuple(array[:, start : start + size] for array in (tokens, positions, segment_ids))
        for start in range(0, time, size)
    ]


def _generate(
    model: LanguageModel, chunks: list[tuple], max_tokens: int, key: jax.Array, settings: tuple
) -> Iterator[np.ndarray]:
    if max_tokens < 1:
        return
    graphdef, params = split(model)
    batch, size = chunks[0][0].shape
    state = model.init_state(batch, len(chunks) * size + max_tokens)
    for tokens, positions, segment_ids in chunks:  # what is drawn before the last one is done is dropped
        tokens, state = _advance(graphdef, params, state, tokens, positions, segment_ids, key, 0, settings)
    for index in range(1, max_tokens):
        following, state = _advance(graphdef, params, state, tokens, None, None, key, index, settings)
        yield np.asarray(tokens)[:, 0]  # while the next one is on its way
        tokens = following
    yield np.asarray(tokens)[:, 0]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    graphdef: nnx.GraphDef,
    params: dict,
    state: dict,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    key: jax.Array,
    index: int,
    settings: tuple,
) -> tuple[jax.Array, dict]:
    """Feeds tokens [batch, time] and draws the ones after the last, number `index` of what is written: [batch, 1]."""
    model = nnx.merge(graphdef, params)
    hidden, state, _ = model.hidden(tokens, state, positions, segment_ids)
    return sample(jax.random.fold_in(key, index), model.logits(hidden[:, -1]), *settings)[:, None], state


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws int32 [batch] from logits [batch, vocab_size]; see `generate` for the settings, which are scalars."""
    vocab_size = logits.shape[-1]
    scaled = logits / jnp.maximum(temperature, 1e-6)
    descending = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(vocab_size, dtype=jnp.int32)
    kept = rank < jnp.where(top_k > 0, top_k, vocab_size)
    probabilities = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < top_p  # the token that reaches top_p is kept
    kept |= rank == 0
    lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled >= lowest, scaled, -jnp.inf), axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
