"""Memory of compiled programs, read from the compiler; nothing is run."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.config import Config, load_config
from lcx.models import LanguageModel
from lcx.params import split

pytestmark = pytest.mark.slow


def test_hidden_states_of_mamba_130m_over_32k_tokens():
    """Forward, one row, float32: neither the recurrent states of all tokens nor all layers' activations exist."""
    config = load_config("configs/mamba.py:size=130m").model
    config.compute_dtype = "float32"
    abstract = nnx.eval_shape(lambda: LanguageModel(Config.from_dict({"model": config}).model, nnx.Rngs(0)))
    graphdef, shapes = split(abstract)
    hidden = lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens)[0]  # noqa: E731
    compiled = jax.jit(hidden).lower(shapes, jax.ShapeDtypeStruct((1, 32_768), jnp.int32)).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"\ntemporaries: {temporaries / 1e9:.2f} GB")
    assert temporaries < 3e9
