"""Mamba's backend is checked when the model is built, with what is known of the calls to come."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.errors import UserError
from lcx.mixers import ModelDims, build_mixer
from lcx_kernels.backends import compiling_for


@pytest.mark.parametrize(
    ("platform", "record", "dtype", "message"),
    [
        (
            "gpu",
            {"state_size": 129, "backend": "triton"},
            jnp.bfloat16,
            'model.mixers.mine: backend "triton" cannot do this call: A has 129 states a channel, and it takes at most',
        ),
        (
            "tpu",
            {"backend": "pallas_tpu"},
            jnp.float64,
            'model.mixers.mine: backend "pallas_tpu" cannot do this call: TPUs have no float64',
        ),
    ],
)
def test_calls_that_a_backend_cannot_do_are_refused(platform, record, dtype, message):
    with jax.enable_x64(True), compiling_for(platform):
        dims = ModelDims(d_model=32, sublayers=2, compute_dtype=dtype)
        build = lambda record: build_mixer("mine", {"type": "mamba"} | record, dims, nnx.Rngs(0))  # noqa: E731
        with pytest.raises(UserError, match=message):
            nnx.eval_shape(lambda: build(record))
        nnx.eval_shape(lambda: build(record | {"backend": "xla"}))
