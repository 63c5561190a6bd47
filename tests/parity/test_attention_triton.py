"""The arithmetic of `triton` attention, in Triton's interpreter: same kernels, grids, blocks, order of arguments."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

from lcx_kernels.attention import triton_gpu, triton_plan
from lcx_kernels.backends import compiling_for
from lcx_kernels.selective_scan.triton_plan import Launch
from tests.kernels.test_attention import AttentionTests
from tests.kernels.test_attention_triton import compare_large
from tests.parity.test_triton_interpreter import Interpreter

pytestmark = pytest.mark.parity
INTERPRETER = Interpreter("lcx_kernels.attention.triton_kernels")


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    INTERPRETER.close()


def plain(launch: triton_plan.Launch) -> Launch:
    """The launch without what the interpreter has no use for."""
    return Launch(**{name: value for name, value in launch._asdict().items() if name != "stages"})


def _call(launch):
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in launch.outputs]
    inputs, launch = launch.inputs, plain(launch)._replace(inputs=())
    return jax.pure_callback(functools.partial(INTERPRETER, launch), results, *inputs)


@contextlib.contextmanager
def interpreted():
    """Lets `triton` be named here."""
    with compiling_for("gpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gpu, "require", lambda: None)
        patch.setattr(triton_gpu, "_call", _call)
        yield


class TestTriton(AttentionTests):
    backend = "triton"
    exact = jnp.float32, 2e-6
    narrow = {"float32": 2e-6, "bfloat16": 1e-2}
    environment = interpreted

    @pytest.mark.parametrize("case", ["causal", "documents in a window", "positions"])
    def test_large(self, case):
        """With the blocks of a GPU."""
        compare_large(case, "triton", jnp.bfloat16, (24, 40), 1e-2)
