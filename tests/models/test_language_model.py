"""The model around the mixers: positions, states, capacity, scan, remat, heads and dtypes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.config import Config, ModelConfig, load_config
from lcx.errors import UserError
from lcx.laws.measure import deviation
from lcx.models import LanguageModel
from lcx.models.language_model import make_context
from lcx.models.pattern import layer_names, parse_pattern
from lcx.models.stack import Layer
from lcx.params import create, split

BATCH, TIME = 2, 12


def small(pattern: str = "mamba mlp swa mlp", **model) -> ModelConfig:
    config = load_config("configs/samba.py:size=tiny").model
    config.update(d_model=32, vocab_size=64, pattern=pattern, **model)
    with config.unlocked():
        config.mixers.swa.update(num_heads=4, num_kv_heads=2, window=5)
        config.mixers.full = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
        config.mixers.mlp.d_ff = 48
    return ModelConfig.from_dict(config)


def make(config: ModelConfig) -> LanguageModel:
    return nnx.merge(*create(lambda: LanguageModel(config, nnx.Rngs(0))))


@partial(jax.jit, static_argnums=0)
def _call(graphdef, params, tokens, state):
    return nnx.merge(graphdef, params)(tokens, state)


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef, params, tokens):
    return nnx.merge(graphdef, params).hidden(tokens)[0]


def call(model: LanguageModel, tokens: jax.Array, state: dict | None = None) -> tuple:
    """(logits, state, aux), compiled."""
    return _call(*split(model), tokens, state)


def hidden_of(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    return _hidden(*split(model), tokens)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make(small("mamba mlp full mlp", periods=2))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, 64, jnp.int32)


def test_call_is_logits_of_hidden_and_the_state_counts(model, tokens):
    logits, state, aux = call(model, tokens)
    hidden = hidden_of(model, tokens)
    np.testing.assert_allclose(logits, hidden @ model.embedding.table[...].T, rtol=1e-5, atol=1e-6)
    assert logits.shape == (BATCH, TIME, 64) and logits.dtype == jnp.float32
    assert state["position"].tolist() == state["length"].tolist() == [TIME] * BATCH
    assert aux["0_mamba"]["mamba"]["metrics"]["state_rms"].shape == (2,)  # one a period


def test_prefill_then_decode_is_one_forward(model, tokens):
    whole, _, _ = call(model, tokens)
    state, parts = model.init_state(BATCH, TIME + 3), []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, TIME)):
        logits, state, _ = call(model, tokens[:, start:stop], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_positions_follow_segments_and_the_state():
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4]], jnp.int32)
    state = {"position": jnp.array([5, 0], jnp.int32), "length": jnp.array([9, 0], jnp.int32)}
    context = make_context(segment_ids.shape, state, None, segment_ids)
    assert context.positions.tolist() == [[5, 6, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    assert context.lookback.tolist() == [[5, 6, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    context = make_context((2, 3), state, None, None)
    assert context.positions.tolist() == [[5, 6, 7], [0, 1, 2]]
    context = make_context((1, 4), None, jnp.array([[7, 8, 0, 1]], jnp.int32), None)
    assert context.segment_ids.tolist() == [[1, 1, 2, 2]]
    assert context.lookback.tolist() == [[0, 1, 0, 1]], "nothing is held, so nothing is seen, whatever the position"


def test_positions_and_segments_must_agree(model, tokens):
    positions = jnp.tile(jnp.arange(TIME, dtype=jnp.int32), (BATCH, 1))
    segment_ids = jnp.ones((BATCH, TIME), jnp.int32).at[1, 4:].set(2)
    with pytest.raises(ValueError, match="disagree at row 1, token 4"):
        model(tokens, None, positions, segment_ids)


def test_a_full_state_is_refused_or_poisons_its_row(model, tokens):
    state = model.init_state(BATCH, TIME)
    state["length"] = jnp.array([0, 1], jnp.int32)
    with pytest.raises(ValueError, match=r"room for 12 tokens and holds 1; 12 more do not fit"):
        model(tokens, state)
    graphdef, params = split(model)

    def mean_of_first_row(params, tokens, state):
        hidden, _, _ = nnx.merge(graphdef, params).hidden(tokens, state)
        return hidden[0].mean(), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(mean_of_first_row, has_aux=True))(params, tokens, state)
    assert np.isnan(hidden[1]).all() and np.isfinite(hidden[0]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), "a poisoned row spoils no gradient"


def test_a_model_without_full_attention_never_fills_up(tokens):
    model = make(small())
    _, state, _ = call(model, tokens, model.init_state(BATCH, 1))
    logits, _, _ = call(model, tokens, state)
    assert np.isfinite(logits).all(), "of a full state they would be NaN"


def test_remat_recomputes_and_changes_nothing_else(tokens):
    """Each policy gives the gradient of none; `full` leaves fewer residuals than `dots`, `dots` fewer than `none`."""
    mixers = ("mamba", "swa", "mlp")
    sizes, gradients, params = {}, {}, split(make(small(" ".join(mixers), periods=2)))[1]
    for policy in ("none", "dots", "full"):
        config = small(" ".join(mixers), periods=2, remat=dict.fromkeys(mixers, policy))
        graphdef, _ = split(nnx.eval_shape(lambda config=config: LanguageModel(config, nnx.Rngs(0))))

        def loss(params, graphdef=graphdef):
            return jnp.sin(7 * nnx.merge(graphdef, params).hidden(tokens)[0]).sum()

        gradients[policy] = jax.jit(jax.grad(loss))(params)
        residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        sizes[policy] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert sizes["full"] < sizes["dots"] < sizes["none"], sizes
    for policy in ("dots", "full"):
        found = deviation({"params": gradients[policy]}, {"params": gradients["none"]})
        assert found.value < 1e-5, found


def test_program_size_does_not_grow_with_periods(tokens):
    def lines(periods: int) -> int:
        graphdef, params = split(nnx.eval_shape(lambda: LanguageModel(small(periods=periods), nnx.Rngs(0))))
        loss = lambda params: nnx.merge(graphdef, params).hidden(tokens)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).as_text().count("\n")

    assert abs(lines(16) / lines(4) - 1) < 0.02


def test_untied_head_is_its_own_parameter(tokens):
    tied, untied = make(small("mlp")), make(small("mlp", tie_embeddings=False))
    assert not hasattr(tied, "head")
    assert untied.head.table.shape == (64, 32)
    logits, hidden = call(untied, tokens)[0], hidden_of(untied, tokens)
    np.testing.assert_allclose(logits, hidden @ untied.head.table[...].T, rtol=1e-5, atol=1e-6)


def test_parallel_sums_two_mixers_of_one_normed_input(tokens):
    model = make(small("parallel(mamba, swa)", periods=1))
    (layer,) = model.stack.layers.values()
    merged = nnx.merge(*[split(layer)[0], jax.tree.map(lambda leaf: leaf[0], split(layer)[1])])
    context = make_context(tokens.shape, None, None, None)

    @jax.jit
    def both(tokens):
        x = model.embedding(tokens, jnp.float32)
        normed = merged.norm(x)
        expected = x + sum(merged.mixers[name](normed, None, context)[0] for name in ("mamba", "swa"))
        return model.stack(x, None, context)[0], expected

    found, expected = both(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_stream_states_and_logits_wide(tokens):
    model = make(small("mamba mlp full mlp", compute_dtype="bfloat16"))
    (logits, state, _), hidden = call(model, tokens), hidden_of(model, tokens)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert state["layers"]["0_mamba"]["mamba"]["ssm"].dtype == jnp.float32
    assert state["layers"]["2_full"]["full"]["key"].dtype == jnp.bfloat16
    exact, _, _ = call(make(small("mamba mlp full mlp")), tokens)
    assert 0 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.03


def test_float64_without_64_bit_jax_is_refused():
    with pytest.raises(UserError, match="model.compute_dtype=float64 needs 64-bit JAX"):
        LanguageModel(small(compute_dtype="float64"), nnx.Rngs(0))


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("", "the pattern is empty"),
        ("mamba mpl", 'unknown mixer "mpl".*did you mean "mlp"'),
        ("mamba parallel(mlp", 'cannot read "parallel'),
        ("parallel(swa, swa)", "names a mixer twice"),
        ("mamba, mlp", 'cannot read "mamba, mlp"'),
    ],
)
def test_patterns_that_cannot_be_read(pattern, message):
    with pytest.raises(UserError, match=message):
        parse_pattern(pattern, ("mamba", "mlp", "swa"))


def test_patterns_name_their_layers():
    pattern = parse_pattern(" mamba  parallel(swa,mlp) mlp", ("mamba", "mlp", "swa"))
    assert pattern == (("mamba",), ("swa", "mlp"), ("mlp",))
    assert layer_names(pattern) == ("0_mamba", "1_swa_mlp", "2_mlp")


def test_config_is_taken_as_a_config_dict(tokens):
    config = load_config("configs/mamba.py:size=tiny")
    assert isinstance(Config.from_dict(config).model, ModelConfig)
    logits, _, _ = jax.eval_shape(lambda tokens: LanguageModel(config.model, nnx.Rngs(0))(tokens), tokens)
    assert logits.shape == (BATCH, TIME, 256)


def test_layers_are_taken_in_the_order_of_the_pattern(monkeypatch):
    """Also where they are more than ten: modules are sorted by their names, "10_m" before "1_m"."""
    taken, mixers = [], {f"m{index}": {"type": "mlp", "d_ff": 4} for index in range(12)}

    def branch(layer, name, *rest, original=Layer.branch):
        taken.append(name)
        return original(layer, name, *rest)

    config = dict(pattern=" ".join(mixers), mixers=mixers, d_model=4, vocab_size=4)
    graphdef, params = create(lambda: LanguageModel(config, nnx.Rngs(0)))
    monkeypatch.setattr(Layer, "branch", branch)
    jax.eval_shape(lambda params: nnx.merge(graphdef, params)(jnp.zeros((1, 2), jnp.int32))[0], params)
    assert taken == list(mixers)
