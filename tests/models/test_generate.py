"""Generation: the model's own forward, for prompts of any lengths in chunks of any size, sampled as asked."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lcx.models.generate as module
from lcx.config import ModelConfig, load_config
from lcx.models import LanguageModel
from lcx.models.generate import generate, left_pad, sample
from lcx.params import create, split

SETTINGS = dict(temperature=jnp.float32(1), top_k=jnp.int32(0), top_p=jnp.float32(1))
FAMILIES = (
    "transformer",
    "mamba",
    pytest.param("mamba2", marks=pytest.mark.slow),
    "samba",
    "infini",
    "infini:update=segment_delta",
    "sink:form=logit",
    "sink:form=token,window=128",
)
GROWING = ("transformer", "sink:form=logit")  # full attention
SMALL = {"num_heads": 4, "num_kv_heads": 2, "window": 5, "segment_length": 4, "d_ff": 48, "num_groups": 2}
# Longer and shorter than windows and segments; alone and together they end at different places of a segment.
PROMPTS = [np.array(prompt) for prompt in ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8], [0])]
PROGRAMS = ("_read", "_write_out", "_write")
COUNT = 6
# That chunks of any size are the whole is every mixer's own law (continuation); a hybrid shows it of generation.
CHUNK_SIZES = {"samba": (1, 3, 7)}


@cache
def small_model(family: str) -> LanguageModel:
    name, _, options = family.partition(":")
    config = load_config(f"configs/{name}.py:size=tiny" + (f",{options}" if options else "")).model
    config.update(d_model=32, vocab_size=16, periods=min(config.periods, 2))
    with config.unlocked():
        for record in config.mixers.values():
            record.update({key: SMALL[key] for key, value in record.items() if key in SMALL and value is not None})
            if record.type in ("attention", "infini"):
                record.num_kv_heads = SMALL["num_kv_heads"]
    return nnx.merge(*create(lambda: LanguageModel(ModelConfig.from_dict(config), nnx.Rngs(0))))


@pytest.fixture
def write(monkeypatch):
    """write(model, prompts, chunk_size): greedy tokens [batch, COUNT] and the logits that they come from."""
    seen = []

    def spied(model, hidden, logits=LanguageModel.logits):
        found = logits(model, hidden)
        jax.debug.callback(lambda array: seen.append(np.asarray(array)), found, ordered=True)
        return found

    monkeypatch.setattr(LanguageModel, "logits", spied)
    clear()

    def write(model, prompts, chunk_size=None):
        seen.clear()
        tokens = np.stack(list(generate(model, prompts, COUNT, temperature=0.0, chunk_size=chunk_size)), axis=1)
        jax.effects_barrier()
        return tokens, np.stack(seen[-COUNT:], axis=1)

    yield write
    clear()


def clear():
    for name in PROGRAMS:
        getattr(module, name).clear_cache()


def whole_forward(model: LanguageModel, prompts: list[np.ndarray], written: np.ndarray) -> np.ndarray:
    """The logits [batch, COUNT, vocab_size] of what was written, from one forward over each whole text.

    Texts begin where rows begin, without a state; zeros behind the shorter ones, which causal mixers do not see.
    """
    texts = [np.concatenate([prompt, tokens]) for prompt, tokens in zip(prompts, written, strict=True)]
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    graphdef, params = split(model)
    logits = jax.jit(lambda params, rows: nnx.merge(graphdef, params)(rows)[0])(params, rows)
    return np.stack([row[len(prompt) - 1 :][:COUNT] for row, prompt in zip(logits, prompts, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_lengths_in_chunks_of_any_size(family, write):
    """Tokens and logits of the batch are those of each text alone, in one forward, however the prompts are read."""
    model = small_model(family)
    tokens, logits = write(model, PROMPTS)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(logits, whole_forward(model, PROMPTS, tokens), rtol=1e-4, atol=1e-5)
    for chunk_size in CHUNK_SIZES.get(family, (3,)):
        chunked, chunked_logits = write(model, PROMPTS, chunk_size)
        np.testing.assert_array_equal(chunked, tokens)
        np.testing.assert_allclose(chunked_logits, logits, rtol=1e-4, atol=1e-5)


def test_more_layers_than_ten_keep_their_order(write):
    """While tokens are written, layers have names of their own, and modules are sorted by name."""
    mixers = {"mamba": {"type": "mamba", "state_size": 4}, "swa": {"type": "attention", "num_heads": 2, "window": 5}}
    config = dict(pattern="mamba swa", mixers=mixers, periods=12, d_model=16, vocab_size=32)
    graphdef, params = create(lambda: LanguageModel(config, nnx.Rngs(0)))
    noise = jax.random.normal(jax.random.key(1), (64,))  # so that a layer's place matters
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 0.3 * jnp.resize(noise, leaf.shape), params))
    prompts = [np.arange(9), np.arange(4)]
    tokens, logits = write(model, prompts)
    np.testing.assert_allclose(logits, whole_forward(model, prompts, tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_full_attention_needs_more_memory_for_more_tokens(family, monkeypatch):
    sizes = {}

    def watched(function):
        def shapes(graphdef, params, state, *rest):
            """Computes nothing: sizes are static."""
            sizes[max_tokens].add(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))
            *first, state = jax.eval_shape(partial(function, graphdef), params, state, *rest)
            return *jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), first), state

        return shapes

    for name in PROGRAMS:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    for max_tokens in (10, 10_000):
        sizes[max_tokens] = set()
        for _ in zip(generate(small_model(family), PROMPTS, max_tokens, chunk_size=3), range(9), strict=False):
            pass
    (few,), (many,) = sizes.values()  # and no call changes it
    assert many == few if family not in GROWING else many > 100 * few


def test_one_program_reads_prompts_and_one_writes(monkeypatch):
    traced = []

    def spied(model, tokens, *rest, hidden=LanguageModel.hidden):
        traced.append(tokens.shape)
        return hidden(model, tokens, *rest)

    monkeypatch.setattr(LanguageModel, "hidden", spied)
    clear()
    for prompts in (PROMPTS, [prompt[:10] for prompt in PROMPTS]):  # of eleven tokens and of ten: four chunks of three
        list(generate(small_model("samba"), prompts, COUNT, chunk_size=3))
    assert traced == [(3, 3), (3, 1)]
    clear()


def test_padding_stands_before_the_prompts_as_a_document_of_its_own():
    prompts = [np.array([5, 6, 7, 8, 9]), np.array([4, 3])]
    (first, second) = left_pad(prompts, 3)
    tokens, positions, segment_ids = (np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    assert all(array.shape == (2, 3) and array.dtype == np.int32 for array in (*first, *second))
    assert tokens.tolist() == [[0, 5, 6, 7, 8, 9], [0, 0, 0, 0, 4, 3]]
    assert positions.tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1]]
    assert segment_ids.tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    for chunk_size in (None, 5, 100):  # no longer than it needs to be
        ((tokens, positions, segment_ids),) = left_pad(prompts, chunk_size)
        assert tokens.tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 4, 3]]
        assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
        assert segment_ids.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[3, 1], []], r"not float64\[0\]"),
        ([np.zeros(0, np.int32)], r"not int32\[0\]"),
        ([3, 1], r"not int64\[\]"),
        (np.zeros((1, 2, 3), np.int32), r"not int32\[2, 3\]"),
        ([[0.5]], r"not float64\[1\]"),
        ([], "there is no prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_at_once(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model("samba"), prompts, COUNT)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        generate(small_model("samba"), PROMPTS, COUNT, chunk_size=0)


def test_a_seed_writes_the_same_and_another_does_not():
    prompt = np.array([[3, 1, 4]], np.int32)
    write = lambda seed: [  # noqa: E731
        int(token[0]) for token in generate(small_model("samba"), prompt, 12, temperature=3.0, seed=seed)
    ]
    assert write(1) == write(1) != write(2)
    assert list(generate(small_model("samba"), prompt, 0)) == []


def draws(count: int = 4000, **settings) -> np.ndarray:
    """How often each of five tokens of known probabilities is drawn."""
    logits = np.tile(np.log(np.array([0.05, 0.4, 0.1, 0.15, 0.3], np.float32)), (count, 1))
    tokens = jax.jit(sample)(jax.random.key(0), logits, **(SETTINGS | settings))
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
