"""Generation: prefill and decoding over the model's one forward."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.models.language_model import LanguageModel
from lcx.params import split

# Tokens that one call of the device writes, after 1, 2, 4 and so on: the first ones come at once, and later ones share
# what a call costs.
MOST_AT_ONCE = 16


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
    fixed size, and a prompt is read in chunks. While tokens are written the weights are there twice.

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
        last, state = _read(graphdef, params, state, tokens, positions, segment_ids, key, settings)
    written, found, count = 1, last[None], 1
    if max_tokens > 1:
        graphdef, params, state = _write_out(graphdef, params, state)
    while written < max_tokens:
        more = min(written, MOST_AT_ONCE, max_tokens - written)
        following, last, state = _write(graphdef, params, state, last, key, written, more, settings)
        yield from np.asarray(found)[:count]  # while the next ones are on their way
        written, found, count = written + more, following, more
    yield from np.asarray(found)[:count]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
    graphdef: nnx.GraphDef,
    params: dict,
    state: dict,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
    settings: tuple,
) -> tuple[jax.Array, dict]:
    """Feeds a chunk of the prompts [batch, time] and draws the tokens [batch] after its last."""
    model = nnx.merge(graphdef, params)
    hidden, state, _ = model.hidden(tokens, state, positions, segment_ids)
    return sample(jax.random.fold_in(key, 0), model.logits(hidden[:, -1]), *settings), state


@partial(jax.jit, static_argnums=0)
def _write_out(graphdef: nnx.GraphDef, params: dict, state: dict) -> tuple[nnx.GraphDef, dict, dict]:
    """The same model and state with each layer's weights and state in arrays of their own.

    A token is then put into a cache where that lies. Cut out of stacked arrays, all weights and caches would be copied
    for each token.
    """
    model = nnx.merge(graphdef, params)
    state = state | {"layers": model.stack.apart(state["layers"])}
    model.stack = model.stack.written_out()
    return *split(model), state


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _write(
    graphdef: nnx.GraphDef,
    params: dict,
    state: dict,
    tokens: jax.Array,
    key: jax.Array,
    begin: jax.Array,
    count: jax.Array,
    settings: tuple,
) -> tuple[jax.Array, jax.Array, dict]:
    """Feeds tokens [batch] and draws `count` more, numbers `begin` and on of what is written.

    Returns: (the tokens [MOST_AT_ONCE, batch], zeros behind them; the last of them [batch]; the state).
    """
    model = nnx.merge(graphdef, params)

    def step(index: jax.Array, carry: tuple) -> tuple:
        tokens, state, written = carry
        hidden, state, _ = model.hidden(tokens[:, None], state)
        tokens = sample(jax.random.fold_in(key, begin + index), model.logits(hidden[:, 0]), *settings)
        return tokens, state, jax.lax.dynamic_update_index_in_dim(written, tokens, index, 0)

    written = jnp.zeros((MOST_AT_ONCE, *tokens.shape), jnp.int32)
    tokens, state, written = jax.lax.fori_loop(0, count, step, (tokens, state, written))
    return written, tokens, state


def sample(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws int32 [batch] from logits [batch, vocab_size]; see `generate` for the settings, which are scalars."""
    drawn = lambda: _draw(key, logits, temperature, top_k, top_p)  # noqa: E731
    return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _draw(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    vocab_size = logits.shape[-1]
    scaled = logits / jnp.maximum(temperature, 1e-6)
    descending = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(vocab_size, dtype=jnp.int32)
    kept = rank < jnp.where(top_k > 0, top_k, vocab_size)
    probabilities = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < top_p  # the token that reaches top_p is kept
    kept |= rank == 0
    lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(scaled >= lowest, scaled, -jnp.inf), axis=-1).astype(jnp.int32)
