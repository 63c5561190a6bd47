"""Generation: prefill and decoding over the model's one forward."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.models.language_model import LanguageModel
from lcx.params import split


def generate(
    model: LanguageModel,
    prompt: np.ndarray,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Continues prompts, token by token.

    Args:
      model: the model.
      prompt: int32 [batch, time], at least one token; all rows have the same length.
      max_tokens: how many tokens to generate.
      temperature: what logits are divided by; 0 takes the most likely token.
      top_k: sample among the k most likely tokens; 0 among all.
      top_p: sample among the fewest tokens whose probabilities sum to at least this (nucleus sampling, Holtzman et
        al., arXiv 1904.09751), after top_k.
      seed: of the draws; the same seed gives the same tokens.

    Yields int32 [batch], the next token of each row.
    """
    graphdef, params = split(model)
    prompt = jnp.asarray(prompt, jnp.int32)
    state = model.init_state(prompt.shape[0], prompt.shape[1] + max_tokens)
    settings = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    key, tokens = jax.random.key(seed), prompt
    for index in range(max_tokens):
        following, state = _advance(graphdef, params, tokens, state, jax.random.fold_in(key, index), settings)
        if index:
            yield np.asarray(tokens[:, 0])  # while the next one is on its way
        tokens = following[:, None]
    if max_tokens > 0:
        yield np.asarray(tokens[:, 0])


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(
    graphdef: nnx.GraphDef, params: dict, tokens: jax.Array, state: dict, key: jax.Array, settings: tuple
) -> tuple[jax.Array, dict]:
    """Feeds tokens [batch, time] and draws the next ones [batch]."""
    model = nnx.merge(graphdef, params)
    hidden, state, _ = model.hidden(tokens, state)
    return sample(key, model.logits(hidden[:, -1]), *settings), state


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
