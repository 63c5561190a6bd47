"""The `triton` convolution on a GPU, and its refusal where something is missing.

tests/parity has its arithmetic on any machine, tests/aot has it compiled.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.backends import BackendUnavailable, compiling_for
from lcx_kernels.causal_conv import causal_conv
from tests.kernels.test_causal_conv import ConvTests, draw, random_lookback, values_and_gradients


@pytest.mark.gpu
class TestTriton(ConvTests):
    backend = "triton"

    @pytest.fixture(autouse=True)
    def _gpu(self):
        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU")

    def test_inside_shard_map(self):
        if jax.device_count() < 4:
            pytest.skip("needs four GPUs")
        super().test_inside_shard_map()

    def test_whole_segments_and_repeated_runs(self):
        """Segments and blocks of their real sizes, against XLA; and equal to the bit when run again."""
        arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 700, 300, 4).items()}
        cotangents = arguments["x"] + 1, arguments["tail"]
        lookback = random_lookback(2, 700)
        results = [
            values_and_gradients(
                functools.partial(causal_conv, silu=True, backend=name), arguments, cotangents, lookback
            )
            for name in ("triton", "triton", "xla")
        ]
        for name, value in results[0].items():
            np.testing.assert_array_equal(value, results[1][name], err_msg=name)
            np.testing.assert_allclose(value, results[2][name], rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_what_is_missing_is_named(missing, monkeypatch):
    """And "auto" is XLA then."""
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 9, 3, 4).items()}
    message = 'backend "triton" needs triton, jax-triton and JAX\'s CUDA plugin; importing .*triton says: '
    with compiling_for("gpu"):
        with pytest.raises(BackendUnavailable, match=message):
            causal_conv(**arguments, backend="triton")
        causal_conv(**arguments)
