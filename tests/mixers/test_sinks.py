"""Sinks: logits in the denominator, and tokens that no window hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.laws.measure import deviation
from lcx.laws.subject import spread
from lcx.mixers import MIXERS, Context, ModelDims
from lcx.params import Declaration, create, declarations
from lcx_kernels.attention import attention
from tests.readings.sinks import sink_attention

D, HEADS, KV_HEADS = 16, 4, 2
DIMS = ModelDims(D, sublayers=2, param_dtype=jnp.float64, compute_dtype=jnp.float64)
ROW = (9, 1, 3, 12)  # documents of a row: longer and shorter than what the cache holds


def make(**options):
    mixer = MIXERS["attention"]
    options = {"num_heads": HEADS, "num_kv_heads": KV_HEADS} | options
    graphdef, params = create(lambda: mixer(mixer.Options(**options), DIMS, nnx.Rngs(0)))
    return graphdef, spread(params)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x, positions, state=None, length=0):
    context = Context(jnp.asarray(positions), jnp.ones_like(positions), jnp.full((len(x),), length, jnp.int32))
    return nnx.merge(graphdef, params)(x, state, context)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(1, sum(ROW), D))


@pytest.fixture
def positions():
    return np.concatenate([np.arange(size) for size in ROW])[None].astype(np.int32)


@pytest.mark.parametrize("sink, rope_base", [(None, 1e4), ("logit", 1e4), ("zero", 1e4), ("logit", None)])
@pytest.mark.parametrize("window, sink_tokens", [(4, 1), (3, 2), (1, 4), (30, 2), (4, 0), (None, 0)])
def test_the_rolling_cache(window, sink_tokens, sink, rope_base, x, positions):
    """The parallel form against a cache that rolls token by token and takes its places for positions."""
    with jax.enable_x64(True):
        graphdef, params = make(window=window, sink_tokens=sink_tokens, sink=sink, rope_base=rope_base)
        y, _, _ = run(graphdef, params, x, positions)
    heads = lambda name: np.einsum("td,dhk->thk", x[0], params[name]["weight"])  # noqa: E731
    logit = {"logit": params.get("sink_logit"), "zero": np.zeros(HEADS), None: None}[sink]
    settings = dict(window=window, sink_tokens=sink_tokens, sink_logit=logit, rope_base=rope_base)
    out = sink_attention(heads("query"), heads("key"), heads("value"), positions=positions[0], **settings)
    expected = np.einsum("thv,hvd->td", out, params["output"]["weight"])
    distance = deviation({"y": y[0]}, {"y": expected})
    assert distance.value < 1e-9, distance


@pytest.mark.parametrize("window", [None, 4])
def test_a_zero_logit_is_one_more_key_of_zeros(window, x, positions):
    """Softmax-off-by-one: e^0 more in the denominator, and nothing in the numerator."""
    attend = jax.jit(functools.partial(attention, window=window))
    with jax.enable_x64(True):
        q, k, v = (np.random.default_rng(seed).normal(size=(1, 12, 2, 4)) for seed in range(3))
        found, _ = attend(q, k, v, sinks=np.zeros(2))
        # The key of zeros stands where every query sees it: its index is the query's own, one query a row.
        alone, index = np.arange(12, dtype=np.int32)[:, None], np.arange(12, dtype=np.int32)
        index = np.concatenate([np.tile(index, (12, 1)), alone], axis=1)
        keys, values = (np.pad(np.repeat(heads, 12, axis=0), ((0, 0), (0, 1), (0, 0), (0, 0))) for heads in (k, v))
        expected, _ = attend(q[0][:, None], keys, values, positions=(alone, index))
    np.testing.assert_allclose(found[0], expected[:, 0], atol=1e-12)


def declared(**options) -> dict:
    mixer, dims = MIXERS["attention"], ModelDims(D, sublayers=2)
    return declarations(nnx.eval_shape(lambda: mixer(mixer.Options(num_heads=HEADS, **options), dims, nnx.Rngs(0))))


def test_the_logit_is_trained_and_declares_itself():
    assert declared(sink="logit")["sink_logit"] == Declaration(("heads",), decay=False)
    assert "sink_logit" not in declared() and "sink_logit" not in declared(sink="zero")


@pytest.mark.parametrize("sink", [None, "logit"])
def test_half_precision_goes_in_and_out(sink):
    """Sums and statistics are float32 inside; what leaves the mixer, its state included, is bfloat16."""
    mixer, dims = MIXERS["attention"], ModelDims(D, sublayers=2, compute_dtype=jnp.bfloat16)
    heads = []

    def spied(x, positions):
        module = mixer(mixer.Options(num_heads=HEADS, window=3, sink_tokens=1, sink=sink), dims, nnx.Rngs(0))
        module.output = lambda out: heads.append(out.dtype) or out.reshape(*out.shape[:2], -1)
        return module(x, None, Context(positions, jnp.ones_like(positions), jnp.zeros(1, jnp.int32)))

    y, state, _ = jax.eval_shape(spied, jnp.ones((1, 9, D), jnp.bfloat16), np.arange(9, dtype=np.int32)[None])
    assert {y.dtype, *heads, *(leaf.dtype for leaf in state.values())} == {jnp.dtype("bfloat16")}


def test_decoding_far_beyond_the_window_keeps_its_sinks(x):
    """Token by token the state stays as large as it is, and the results those of the whole row."""
    positions = np.arange(x.shape[1], dtype=np.int32)[None]
    with jax.enable_x64(True):
        graphdef, params = make(window=4, sink_tokens=2, sink="logit")
        whole, _, _ = run(graphdef, params, x, positions)
        state = nnx.merge(graphdef, params).init_state(1, 1)
        sizes = jax.tree.map(np.shape, state)
        found = []
        for t in range(x.shape[1]):
            y, state, _ = run(graphdef, params, x[:, t : t + 1], positions[:, t : t + 1], state, t)
            assert jax.tree.map(np.shape, state) == sizes
            found.append(y)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-12)
