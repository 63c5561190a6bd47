"""Generation: the model's own forward, sampled as asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.config import ModelConfig, load_config
from lcx.models import LanguageModel
from lcx.models.generate import generate, sample
from lcx.params import create

SETTINGS = dict(temperature=jnp.float32(1), top_k=jnp.int32(0), top_p=jnp.float32(1))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = load_config("configs/samba.py:size=tiny").model
    config.update(d_model=32, vocab_size=16)
    config.mixers.swa.update(num_heads=4, num_kv_heads=2, window=3)
    return nnx.merge(*create(lambda: LanguageModel(ModelConfig.from_dict(config), nnx.Rngs(0))))


def test_greedy_tokens_are_the_likeliest_of_the_whole_forward(model):
    prompt = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]], np.int32)
    tokens = np.stack(list(generate(model, prompt, 6, temperature=0.0)), axis=1)
    assert tokens.shape == (2, 6)
    whole, _, _ = model(jnp.asarray(np.concatenate([prompt, tokens], axis=1)))
    np.testing.assert_array_equal(tokens, np.argmax(whole, axis=-1)[:, 4:-1])


def test_a_seed_writes_the_same_and_another_does_not(model):
    prompt = np.array([[3, 1, 4]], np.int32)
    write = lambda seed: [int(token[0]) for token in generate(model, prompt, 12, temperature=3.0, seed=seed)]  # noqa: E731
    assert write(1) == write(1) != write(2)


def draws(count: int = 4000, **settings) -> np.ndarray:
    """How often each of five tokens of known probabilities is drawn."""
    probabilities = jnp.array([0.05, 0.4, 0.1, 0.15, 0.3])
    logits = jnp.broadcast_to(jnp.log(probabilities), (count, 5))
    tokens = sample(jax.random.key(0), logits, **(SETTINGS | settings))
    return np.bincount(np.asarray(tokens), minlength=5) / count


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.05, 0.4, 0.1, 0.15, 0.3]),
        ({"temperature": jnp.float32(0)}, [0, 1, 0, 0, 0]),
        ({"temperature": jnp.float32(0.5)}, np.square([0.05, 0.4, 0.1, 0.15, 0.3]) / 0.285),
        ({"top_k": jnp.int32(2)}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_p": jnp.float32(0.69)}, [0, 4 / 7, 0, 0, 3 / 7]),
        ({"top_p": jnp.float32(0.75)}, [0, 8 / 17, 0, 3 / 17, 6 / 17]),
        ({"top_p": jnp.float32(0)}, [0, 1, 0, 0, 0]),
        ({"top_k": jnp.int32(3), "top_p": jnp.float32(0.5)}, [0, 4 / 7, 0, 0, 3 / 7]),
    ],
)
def test_tokens_are_drawn_as_asked(settings, expected):
    np.testing.assert_allclose(draws(**settings), expected, atol=0.025)
