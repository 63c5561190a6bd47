"""What each suite measures, against the same thing computed in the plainest way."""

import dataclasses
import math
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.config import ModelConfig
from lcx.errors import UserError
from lcx.evaluation.observe import observed
from lcx.evaluation.streaming import row_losses
from lcx.evaluation.suite import Curves, Grid, Material
from lcx.evaluation.suites import SUITES, find_suite, heads, needle, passkey, perplexity, read_options, recall, state
from lcx.evaluation.suites.entropy import entropies
from lcx.models import LanguageModel
from lcx.models.language_model import make_context
from lcx.params import create

RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(32, 127, size).astype(np.int32) for size in (70, 9, 64, 65, 200)]


class Bytes:
    start_token = None

    def encode(self, document):
        return np.frombuffer(document.encode() if isinstance(document, str) else document, np.uint8).astype(np.int32)

    def decode(self, tokens):
        return bytes(int(token) for token in tokens)


def question(options, index):
    """A key in a text, as the synthetic task has it."""
    key = f"{index:0{options['digits']}}"
    words = f"x{key}y".rjust(options["length"] - len(key), ".") + key
    tokens = Bytes().encode(words)
    answers = np.zeros(len(tokens), np.int32)
    answers[-len(key) :] = 1
    return SimpleNamespace(tokens=tokens, answers=answers, accepted={})


def score(example, predictions):
    right = bool(np.all((predictions == example.tokens)[example.answers > 0]))
    return int(right), 1


MATERIAL = Material(
    tokenizer=Bytes(),
    train_length=16,
    documents=lambda files: DOCUMENTS,
    examples=lambda task, options, count: [question({"digits": 2} | dict(options), index) for index in range(count)],
    score=score,
    chunk_size=8,
    batch_size=2,
)


@cache
def make(pattern="mamba attention"):
    mixers = {"mamba": {"type": "mamba", "state_size": 4}, "mamba2": {"type": "mamba2", "head_dim": 8, "state_size": 4}}
    mixers |= {name: {"type": "attention", "num_heads": 4, "num_kv_heads": 2} for name in ("attention", "swa")}
    mixers["swa"] = mixers["swa"] | {"window": 6, "sink": "zero"}
    chosen = {name: mixers[name] for name in pattern.split()}
    config = ModelConfig(pattern=pattern, mixers=chosen, periods=2, d_model=16, vocab_size=256)
    return nnx.merge(*create(lambda: LanguageModel(config, nnx.Rngs(0))))


@cache
def forward(pattern="mamba attention"):
    model = make(pattern)
    return jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)[0]))


def nats(tokens):
    """Of tokens[1:], in one pass; padded, so that one program serves all lengths."""
    padded = np.pad(tokens[:-1], (0, 80 - len(tokens) + 1))
    return -np.asarray(forward()(padded[None]))[0, np.arange(len(tokens) - 1), tokens[1:]]


def bits(losses):
    return np.mean(np.concatenate(losses)) / math.log(2)


def found(suite, model, **options):
    return dict(find_suite(suite).run(model, read_options(suite, options), MATERIAL))


def test_perplexity_by_position_length_and_window():
    result = found("perplexity", make(), lengths=(16, 64), window=12, stride=5, whole=2, longest=69, documents=2)
    long = [document[:65] for document in DOCUMENTS if len(document) > 64][:2]
    alone = [nats(document) for document in long]
    assert result["bits_at_64"] == pytest.approx(bits(alone), abs=1e-5)
    assert result["bits_before_64"] == pytest.approx(bits(alone), abs=1e-5)
    cut = [nats(document[i : i + 17]) for document in long for i in range(0, 64, 16)]
    assert result["bits_at_16"] == pytest.approx(bits(cut), abs=1e-5)
    windows = [(nats(document[i : i + 13]), i) for document in long for i in range(0, 53, 5)]
    sliding = [losses if start == 0 else losses[-5:] for losses, start in windows]
    assert result["bits_sliding_12_5"] == pytest.approx(bits(sliding), abs=1e-5)
    whole = [nats(document) for document in DOCUMENTS if len(document) <= 69][:2]
    assert result["bits_of_whole_documents"] == pytest.approx(bits(whole), abs=1e-5)
    curves = result["bits by position"]
    assert isinstance(curves, Curves) and curves.x == [64] and curves.marks == {"training length": 16}


def test_buckets_join_to_the_whole():
    assert perplexity.bucket_ends(64) == [64] and perplexity.bucket_ends(300) == [64, 128, 256, 300]
    with pytest.raises(UserError, match="no document has more than 5000 tokens .the longest has 200."):
        found("perplexity", make(), lengths=(5000,))


@pytest.mark.slow
def test_a_start_token_begins_every_piece():
    material = dataclasses.replace(MATERIAL, tokenizer=type("Start", (Bytes,), {"start_token": 1})())
    options = perplexity.Options(lengths=(16, 64), documents=1, whole=0)
    result = dict(perplexity.run(make(), options, material))
    first = np.insert(DOCUMENTS[0][:65], 0, 1)
    assert result["bits_at_64"] == pytest.approx(bits([nats(first)[1:]]), abs=1e-5)
    cut = [nats(np.insert(DOCUMENTS[0][i : i + 17], 0, 1))[1:] for i in range(0, 64, 16)]
    assert result["bits_at_16"] == pytest.approx(bits(cut), abs=1e-5)


def copycat(monkeypatch, module, text):
    """Makes a suite's model write what `text` says, of each prompt."""
    calls = []

    def write(model, prompts, max_tokens, chunk_size, batch_size):
        calls.extend(prompts)
        return [Bytes().encode(text(bytes(prompt.tolist()).decode()))[:max_tokens] for prompt in prompts]

    monkeypatch.setattr(module, "write", write)
    return calls


def test_passkeys_are_counted_by_length_and_depth(monkeypatch):
    calls = copycat(monkeypatch, passkey, lambda prompt: " 00. " if len(prompt) == 14 else " 0" + prompt[-3:-1] + "!")
    result = found("passkey", None, lengths=(16, 32), depths=3, samples=2, digits=2)
    assert [len(prompt) for prompt in calls] == [14] * 6 + [30] * 6
    assert result["accuracy_at_16"] == 0.5 and result["accuracy_at_32"] == 1.0 and result["accuracy"] == 0.75
    grid = result["accuracy by length and depth"]
    assert isinstance(grid, Grid) and grid.rows == [0.0, 0.5, 1.0] and grid.values == [[0.5, 1.0]] * 3


def test_needles_stand_after_a_period_at_their_depth(monkeypatch):
    essay = Bytes().encode("One short sentence. " * 40)
    material = dataclasses.replace(MATERIAL, documents=lambda files: [essay])
    options = needle.Options(buffer=150)
    for depth in (0.0, 0.4, 1.0):
        text = bytes(needle.prompt(600, depth, options, material).tolist()).decode()
        context, _, ending = text.partition("\n\nQuestion: ")
        before, _, after = context.partition(" " + options.needle)
        assert len(context) == 450 and ending.endswith("Answer: " + options.answer_begins)
        room = 450 - len(options.needle) - 1
        assert after == "" if depth == 1 else (before == "" or before.endswith("."))
        assert room * depth - 20 <= len(before) <= room * depth
    calls = copycat(monkeypatch, needle, lambda prompt: " EAT a sandwich and sit in Dolores Park on a sunny day!")
    result = dict(needle.run(None, dataclasses.replace(options, lengths=(600,), depths=2), material))
    assert result["found_at_600"] == 1.0 and len(calls) == 2
    copycat(monkeypatch, needle, lambda prompt: " eat a salad in Dolores Park")
    result = dict(needle.run(None, dataclasses.replace(options, lengths=(600,), depths=2), material))
    assert result["found"] == 0.0 and result["rouge-1 recall by length and depth"].values[0][0] == pytest.approx(5 / 12)


def test_recall_is_greedy_writing():
    """Teacher forcing and writing agree, answer by answer."""
    model = make()
    examples = [question({"digits": 1, "length": 12}, index) for index in range(6)]
    right = [Bytes().encode(".")[0] != 0 for _ in examples]
    for example, row in zip(examples, range(6), strict=True):  # answers that the model gives, but for two
        token = int(np.argmax(forward()(np.pad(example.tokens[:-1], (0, 69))[None])[0, 10]))
        example.tokens = example.tokens.copy()
        example.tokens[-1] = token if row % 3 else (token + 1) % 256
        right[row] = bool(row % 3)
    assert recall.solve(model, examples, MATERIAL) == pytest.approx(np.mean(right)) == 4 / 6


def test_states_are_measured_where_they_stand():
    result = found("state", make(), length=64, points=4)
    text = np.concatenate(DOCUMENTS)[:48]
    _, after, _ = jax.jit(make())(text[None])
    ssm = np.asarray(after["layers"]["0_mamba"]["mamba"]["ssm"])[:, 0]
    norms = result["norm of 0_mamba/ssm"]
    assert norms.x == [16, 32, 48, 64]
    for period in range(2):
        expected = (np.linalg.norm(ssm[period]), ssm[period].mean(), ssm[period].var())
        for statistic, value in zip(state.STATISTICS, expected, strict=True):
            line = result[f"{statistic} of 0_mamba/ssm"].lines[f"period {period}"]
            assert line[2] == pytest.approx(value, abs=1e-5, rel=1e-4)
    lines = norms.lines.values()
    assert result["0_mamba/ssm_growth"] == pytest.approx(max(line[3] / line[0] for line in lines))
    with pytest.raises(UserError, match="no layer of this model has a recurrent state"):
        found("state", make("swa"), length=64)


def capture(model, rows):
    """Inputs of each mixer of the first period."""
    x = model.embedding(jnp.asarray(rows), model.residual_dtype)
    layers = nnx.clone(model.stack.layers)
    nnx.update(layers, jax.tree.map(lambda leaf: leaf[0], nnx.state(layers)))
    return x, layers


@pytest.mark.slow
def test_entropies_are_those_of_the_weights():
    """The first layer's, from its queries and keys, chunk by chunk, with a window and a sink, and full."""
    rows = np.stack([DOCUMENTS[0][:17], DOCUMENTS[4][:17]])
    for pattern, window in (("attention", 99), ("swa", 6)):
        model = make(pattern)
        found, _ = entropies(observed(model), rows, 4)
        x, layers = capture(model, rows[:, :16])
        layer = next(iter(layers.values()))
        mixer = layer.mixers[pattern]
        query, key, _ = mixer.project(layer.norm(x))
        positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
        query, key = mixer.rotated(query, positions), mixer.rotated(key, positions)
        scores = jnp.einsum("bqhk,bshk->bqhs", query, jnp.repeat(key, 2, axis=2)) / 2
        distance = jnp.arange(16)[:, None] - jnp.arange(16)
        scores = jnp.where(((distance >= 0) & (distance < window))[:, None], scores, -jnp.inf)
        weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
        total = weights.sum(-1, keepdims=True) + (jnp.exp(-jnp.max(scores, -1, keepdims=True)) if window == 6 else 0)
        weights = np.asarray(weights / total)
        expected = -np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-30)), 0), -1)
        np.testing.assert_allclose(found[f"0_{pattern}"][0], expected, atol=1e-5)


@pytest.mark.slow
def test_selection_is_the_entropy_of_dt_over_the_sequence():
    rows = DOCUMENTS[4][None, :33]
    for pattern in ("mamba", "mamba2"):
        model = make(pattern)
        _, found = entropies(observed(model), rows, 8)
        x, layers = capture(model, rows[:, :32])
        layer = next(iter(layers.values()))
        mixer, seen = layer.mixers[pattern], {}
        mixer._scan = lambda x, dt, *rest, scan=mixer._scan, seen=seen: seen.update(dt=dt) or scan(x, dt, *rest)
        mixer(layer.norm(x), None, make_context((1, 32), None, None, None))
        dt = np.log1p(np.exp(np.asarray(seen["dt"] + mixer.dt_bias[...])))[0]
        share = dt / dt.sum(0)
        np.testing.assert_allclose(found[f"0_{pattern}"][0, 0], -(share * np.log(share)).sum(0), rtol=1e-4)


@pytest.mark.slow
def test_observed_models_are_the_same_models():
    tokens = DOCUMENTS[4][None, :33]
    for pattern in ("mamba attention", "mamba2 swa"):
        model = make(pattern)
        np.testing.assert_array_equal(row_losses(observed(model), tokens, 16), row_losses(model, tokens, 16))


def test_credit_needs_the_right_token_at_the_right_place():
    """Context "x12y..", answer "12": place 1 and 2. Heads: copies both; looks at the right place too late; looks at
    another 1; copies one of two."""
    tokens = Bytes().encode("x12y1.12")
    example = SimpleNamespace(tokens=tokens, answers=np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    looked = np.array([[1, 2], [2, 1], [4, 2], [1, 5]])  # places, of each head, at the queries 5 and 6
    distances = np.zeros((1, 7, 4), int)
    for head, places in enumerate(looked):
        distances[0, [5, 6], head] = np.array([5, 6]) - places
    np.testing.assert_array_equal(heads.credit(example, distances), [[1.0, 0.0, 0.5, 0.5]])


@pytest.mark.slow
def test_masked_heads_write_nothing():
    model = make("attention")
    every = [("0_attention", "attention", period, head) for period in range(2) for head in range(4)]
    masked = heads.mask(model, every)
    tokens = jnp.asarray(DOCUMENTS[0][None, :8])
    bare = model.logits(model.norm(model.embedding(tokens, model.residual_dtype)).astype(model.compute_dtype))
    np.testing.assert_allclose(masked(tokens)[0], bare, atol=1e-6)
    one = heads.mask(model, every[:1])
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(nnx.state(model)))  # which is as it was
    assert np.abs(np.asarray(one(tokens)[0] - model(tokens)[0])).max() > 1e-3


def test_heads_that_retrieve_are_found_and_missed(monkeypatch):
    """A model that answers until its best head is masked."""
    model = make("attention")
    best = ("0_attention", "attention", 1, 2)

    def answer(model, examples, material):
        weight = model.stack.layers[best[0]].mixers[best[1]].output.weight[...]
        return [bool(jnp.any(weight[best[2], best[3]] != 0)) and int(example.tokens[-1]) != 48 for example in examples]

    def scores(model, examples, chunk_size):
        grid = np.zeros((2, 4))
        grid[1, 2], grid[0, 0] = 0.9, 0.05
        return {best[:2]: grid}

    monkeypatch.setattr(heads.passkey, "answer", answer)
    monkeypatch.setattr(heads, "head_scores", scores)
    result = found("heads", model, length=32, samples=5)
    assert result["accuracy"] == 0.8 and result["solved_samples"] == 4
    assert result["share_of_retrieval_heads"] == 1 / 8 and result["share_of_heads_without_score"] == 6 / 8
    assert result["accuracy_on_solved_without_best_heads"] == 0.0
    assert result["accuracy_on_solved_without_random_heads"] == 1.0


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_of_the_table_is_one(name):
    suite = find_suite(name)
    assert dataclasses.is_dataclass(suite.Options) and callable(suite.run)
    assert read_options(name, {}) == suite.Options()


def test_mistakes_are_named():
    with pytest.raises(UserError, match='unknown suite "passkeys": did you mean "passkey"'):
        find_suite("passkeys")
    with pytest.raises(UserError, match='unknown key "evaluation.options.passkey.lenghts": did you mean "lengths"'):
        read_options("passkey", {"lenghts": [1]})
    with pytest.raises(UserError, match='cannot import "my_package.suite"'):
        find_suite("my_package.suite")
    assert find_suite("lcx.evaluation.suites.state") is state  # a suite of one's own is an import path
