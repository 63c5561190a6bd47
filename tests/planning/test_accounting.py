"""What a model will cost, against models that exist and against sums by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.config import load_config
from lcx.errors import UserError
from lcx.models import LanguageModel
from lcx.params import create, split
from lcx.planning import flops_per_token, parameter_count, state_bytes

FAMILIES = ["transformer.py", "mamba.py", "mamba2.py", "samba.py", "infini.py", "sink.py:form=token,window=60"]


def config_of(argument, **fields):
    config = load_config(f"configs/{argument}").model
    config.update(fields)
    return config


@pytest.mark.parametrize("argument", FAMILIES)
def test_a_model_that_exists_has_what_was_planned(argument):
    config = config_of(argument, compute_dtype="bfloat16", d_model=64, periods=1)
    model = nnx.merge(*create(lambda: LanguageModel(config, nnx.Rngs(0))))
    size = lambda leaf: leaf.size * leaf.dtype.itemsize  # noqa: E731
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(split(model)[1]))
    for context in (100, 1000):
        state = jax.eval_shape(lambda context=context: model.init_state(1, context))
        assert state_bytes(config, context) == sum(map(size, jax.tree.leaves(state)))
        assert flops_per_token(config, context) * context == pytest.approx(model.flops(context), rel=1e-12)
    left = jax.eval_shape(lambda tokens: model(tokens, model.init_state(1, 100))[1], jnp.zeros((1, 100), jnp.int32))
    assert state_bytes(config, 100) == sum(map(size, jax.tree.leaves(left)))


def test_published_sizes_by_hand():
    samba, llama = (
        config_of(name, compute_dtype="bfloat16") for name in ("samba.py:size=421m", "transformer.py:size=1.6b")
    )
    counters = 2 * 4
    mamba = 3 * 3072 * 2 + 3072 * 16 * 4  # taps in bfloat16, h in float32
    windows = 2 * 2047 * 12 * 128 * 2
    assert state_bytes(samba, 4096) == state_bytes(samba, 2**20) == 6 * (mamba + windows) + counters
    for context in (4096, 2**20):  # 26 GB at the end: nothing of it is allocated
        assert state_bytes(llama, context) == 24 * 2 * context * 4 * 64 * 2 + counters
    matrices = parameter_count(llama) - 50_304 * 2048 - (2 * 24 + 1) * 2048  # all that multiply: no lookup, no norms
    for tokens in (1, 4096, 32_768):
        assert flops_per_token(llama, tokens) == 2 * matrices + 24 * 4 * 2048 * (tokens + 1) / 2


def test_a_mistake_in_the_model_is_named():
    with pytest.raises(UserError, match="num_heads=7"):
        parameter_count(config_of("transformer.py", mixers={"attention": {"type": "attention", "num_heads": 7}}))
