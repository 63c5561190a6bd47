"""Infini-attention: what the paper's equations imply, and what the gates declare."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx import laws
from lcx.config import Config, load_config
from lcx.laws.measure import deviation
from lcx.laws.subject import spread
from lcx.mixers import MIXERS, Context, ModelDims
from lcx.models import LanguageModel
from lcx.params import Declaration, create, declarations
from tests.readings import of_lcx
from tests.readings.infini import infini_attention
from tests.readings.pieces import window_attention

D, HEADS, KV_HEADS, SEGMENT = 16, 4, 2, 4
DIMS = ModelDims(D, sublayers=2, param_dtype=jnp.float64, compute_dtype=jnp.float64)
OPTIONS = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "segment_length": SEGMENT}


def make(**options):
    mixer = MIXERS["infini"]
    graphdef, params = create(lambda: mixer(mixer.Options(**OPTIONS, **options), DIMS, nnx.Rngs(0)))
    return graphdef, spread(params)


@partial(jax.jit, static_argnums=0)
def run(graphdef, params, x, positions, state=None):
    length = jnp.zeros((len(x),), jnp.int32)
    context = Context(jnp.asarray(positions), jnp.ones_like(positions), length)
    return nnx.merge(graphdef, params)(x, state, context)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(1, 18, D))


@pytest.mark.parametrize("update", ["linear", "segment_delta"])
@pytest.mark.parametrize("documents", [(18,), (7, 1, 10), (4, 4, 10)])
def test_the_reading_of_the_paper(update, documents, x):
    """Outputs and memory, packed documents included; the row ends inside a segment."""
    positions = np.concatenate([np.arange(size) for size in documents]).astype(np.int32)
    with jax.enable_x64(True):
        graphdef, params = make(update=update)
        y, state, _ = run(graphdef, params, x, positions[None])
    options = OPTIONS | dict(update=update, rope_base=10_000.0, positions=positions)
    expected, memory, normalizer = infini_attention(x[0], of_lcx.attention(params), **options)
    found = {"y": y[0], "memory": state["memory"][0], "normalizer": state["normalizer"][0]}
    distance = deviation(found, {"y": expected, "memory": memory, "normalizer": normalizer})
    assert distance.value < 1e-9, distance


def test_a_closed_gate_is_attention_within_segments(x):
    """Gate at minus infinity: each segment attends to itself alone, at any distance from the document's start."""
    with jax.enable_x64(True):
        graphdef, params = make()
        params["gate"] = np.full_like(params["gate"], -np.inf)
        y, _, _ = run(graphdef, params, x, np.arange(18, dtype=np.int32)[None])
    weights = of_lcx.attention(params)
    settings = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, window=None, rope_base=10_000.0)
    pieces = [x[0, start : start + SEGMENT] for start in range(0, 18, SEGMENT)]
    alone = [window_attention(piece, weights, positions=np.arange(len(piece)), **settings) for piece in pieces]
    np.testing.assert_allclose(y[0], np.concatenate(alone), atol=1e-12)


def test_a_token_does_not_find_its_own_segment_in_the_memory(x):
    """Gate at infinity: the first segment reads nothing, and the second nothing of itself."""
    with jax.enable_x64(True):
        graphdef, params = make()
        params["gate"] = np.full_like(params["gate"], np.inf)
        positions = np.arange(18, dtype=np.int32)[None]
        y, _, _ = run(graphdef, params, x, positions)
        second = slice(SEGMENT, 2 * SEGMENT)
        values = make()[1]["value"]["weight"]

        def loss(value_weight, piece):
            """Of one segment's tokens alone the value matrix is another; what the second segment reads."""
            graph = nnx.merge(graphdef, params)
            other = nnx.merge(graphdef, params | {"value": {"weight": value_weight}})
            context = Context(positions, np.ones_like(positions), jnp.zeros((1,), jnp.int32))
            projected = other.value(x)
            graph.value = lambda x: jnp.asarray(graph_value(x)).at[:, piece].set(projected[:, piece])
            return jnp.sum(jnp.square(graph(x, None, context)[0][:, second]))

        graph_value = nnx.merge(graphdef, params).value
        pieces = (second, slice(0, SEGMENT))
        own, earlier = jax.jit(lambda values: [jax.grad(loss)(values, piece) for piece in pieces])(values)
    assert np.all(np.asarray(y[:, :SEGMENT]) == 0) and np.any(np.asarray(y[:, second]) != 0)
    assert np.all(np.asarray(own) == 0) and np.any(np.asarray(earlier) != 0)


def test_gates_declare_their_own_rate_and_no_decay():
    mixer, dims = MIXERS["infini"], ModelDims(D, sublayers=2)
    module = nnx.merge(*create(lambda: mixer(mixer.Options(**OPTIONS), dims, nnx.Rngs(0))))
    assert declarations(module)["gate"] == Declaration(("heads",), decay=False, learning_rate=0.01, absolute=True)
    assert np.all(np.asarray(module.gate[...]) == 0)


def test_gates_and_memory_norms_are_reported(x):
    with jax.enable_x64(True):
        graphdef, params = make()
        _, state, aux = run(graphdef, params, x, np.arange(18, dtype=np.int32)[None])
    metrics = aux["metrics"]
    np.testing.assert_allclose(metrics["gate"], 1 / (1 + np.exp(-params["gate"])))
    np.testing.assert_allclose(metrics["memory_norm"], np.linalg.norm(np.asarray(state["memory"])[0], axis=(1, 2)))


def test_half_precision_keeps_the_memory_in_float32():
    dims = replace(DIMS, param_dtype=jnp.float32, compute_dtype=jnp.bfloat16)
    make = lambda: MIXERS["infini"](MIXERS["infini"].Options(**OPTIONS), dims, nnx.Rngs(0))  # noqa: E731
    graphdef, params = create(make)
    x, positions = jnp.ones((1, 9, D), jnp.bfloat16), np.arange(9, dtype=np.int32)[None]
    y, state, _ = jax.eval_shape(partial(run, graphdef), params, x, positions)
    wide = {name: leaf.dtype for name, leaf in state.items() if "memory" in name or "normalizer" in name}
    assert set(wide.values()) == {jnp.dtype("float32")} and len(wide) == 4 and y.dtype == jnp.bfloat16
    empty = nnx.merge(graphdef, params).init_state(1, 9)
    assert {name: leaf.dtype for name, leaf in empty.items()} == {n: a.dtype for n, a in state.items()}


@pytest.mark.parametrize("update", ["linear", "segment_delta"])
def test_segment_by_segment_is_layer_by_layer(update):
    """All layers over one segment and then over the next, or every layer over the whole row: the same model."""
    config = load_config(f"configs/infini.py:update={update}")
    config.model.update(d_model=D, vocab_size=32, param_dtype="float64", compute_dtype="float64", periods=2)
    config.model.mixers.infini.update(num_heads=HEADS, segment_length=SEGMENT)
    config.model.mixers.mlp.d_ff = 24
    with jax.enable_x64(True):
        model = nnx.merge(*create(lambda: LanguageModel(Config.from_dict(config).model, nnx.Rngs(0))))
        tokens = jax.random.randint(jax.random.key(0), (2, 5 * SEGMENT), 0, 32, jnp.int32)
        whole = jax.jit(lambda tokens: model(tokens)[0])(tokens)
        one = jax.jit(lambda tokens, state: model(tokens, state)[:2])
        state, parts = model.init_state(2, 5 * SEGMENT), []
        for start in range(0, 5 * SEGMENT, SEGMENT):
            logits, state = one(tokens[:, start : start + SEGMENT], state)
            parts.append(logits)
    distance = deviation({"logits": np.concatenate(parts, axis=1)}, {"logits": np.asarray(whole)})
    assert distance.value < laws.TOLERANCE["float64"], distance
