"""Streams: chunk by chunk is the whole, and eviction is the attention of a rolling cache."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.config import Config, load_config
from lcx.errors import UserError
from lcx.evaluation.streaming import evicting, stream_losses
from lcx.models import LanguageModel
from lcx.models.cross_entropy import token_losses
from lcx.params import create, split

TIME, WINDOW, SINKS = 40, 6, 2


@cache
def make(case: str, **options) -> LanguageModel:
    config = load_config(f"configs/{case}")
    config.model.update(d_model=32, vocab_size=32, periods=2)
    config.model.mixers.mlp.d_ff = 48
    with config.unlocked():
        for record in config.model.mixers.values():
            if record["type"] == "attention":
                record.update(num_heads=4, num_kv_heads=2, **options)
    return nnx.merge(*create(lambda: LanguageModel(Config.from_dict(config).model, nnx.Rngs(0))))


TOKENS = np.random.default_rng(0).integers(0, 32, TIME + 1, np.int32)


@cache
def whole_losses(case: str) -> np.ndarray:
    model = make(case)

    @jax.jit
    def losses(tokens):
        hidden, _, _ = model.hidden(tokens[:, :-1])
        return token_losses(model.output_table, hidden, tokens[:, 1:], TIME)[0][0]

    return np.asarray(losses(TOKENS[None]))


@pytest.mark.parametrize("case", ["samba.py", "transformer.py"])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_are_the_whole(case, chunk_size):
    np.testing.assert_allclose(stream_losses(make(case), TOKENS, chunk_size), whole_losses(case), rtol=1e-4)


@pytest.mark.parametrize("form, sinks", [("logit", 0), ("zero", SINKS), ("token", 1)])
def test_eviction_is_the_attention_of_a_window_with_sinks(form, sinks):
    """The same numbers as a model trained with that window; those of full attention until a token is evicted."""
    case = f"sink.py:form={form}"
    full, windowed = make(case), make(case, window=WINDOW, sink_tokens=sinks)
    nnx.update(windowed, nnx.state(full))
    evicted = stream_losses(evicting(full, WINDOW, sinks), TOKENS, chunk_size=9)
    np.testing.assert_allclose(evicted, stream_losses(windowed, TOKENS, chunk_size=9), rtol=1e-6)
    everything, kept = whole_losses(case), WINDOW + sinks
    np.testing.assert_allclose(evicted[:kept], everything[:kept], rtol=1e-4)
    assert np.abs(evicted[kept:] - everything[kept:]).min() > 1e-6


def test_evicting_bounds_the_state_and_leaves_the_model_as_it_was():
    model = make("sink.py:form=logit")
    size = lambda model, length: sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_state(1, length)))  # noqa: E731
    bounded = evicting(model, WINDOW, 4)
    assert size(bounded, 100) == size(bounded, 10_000) < size(model, 100) < size(model, 10_000)
    assert jax.tree.map(id, split(model)[1]) == jax.tree.map(id, split(bounded)[1])  # not a copy of the parameters


def test_mistakes_are_named():
    model = make("sink.py:form=logit")
    with pytest.raises(UserError, match="window=0 must be at least 1"):
        evicting(model, 0, 1)
    with pytest.raises(UserError, match="no layer of this model has full attention"):
        evicting(evicting(model, 8, 1), 8, 1)
