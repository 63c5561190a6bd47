"""The arithmetic of the `triton` chunked memory, in Triton's interpreter.

The whole backend runs with every launch handed to the interpreter in place of jax-triton, as in
`test_triton_interpreter`.
"""

import contextlib
import functools

import jax
import pytest

from lcx_kernels.backends import compiling_for
from lcx_kernels.chunked_memory import triton_gpu, triton_plan
from tests.kernels import test_chunked_memory as base
from tests.kernels.test_chunked_memory_triton import TritonTests
from tests.parity.test_triton_interpreter import Interpreter

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="Triton's interpreter works on tensors of PyTorch")
pytest.importorskip("triton", reason="the kernels are written in Triton")

INTERPRETER = Interpreter("lcx_kernels.chunked_memory.triton_kernels")


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    INTERPRETER.close()


def _call(launch: triton_plan.Launch) -> tuple[jax.Array, ...]:
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in launch.outputs]
    inputs, launch = launch.inputs, launch._replace(inputs=())
    return jax.pure_callback(functools.partial(INTERPRETER, launch), results, *inputs)


@contextlib.contextmanager
def interpreted(shortest_span: int = 2**20):
    """Lets `triton` be named here; time is cut into spans of at least so many chunks."""
    # What was traced in another environment is not of this one.
    base.pulled.cache_clear()
    base.outputs_and_gradients.clear_cache()
    with compiling_for("gpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gpu, "require", lambda: None)
        patch.setattr(triton_gpu, "_call", _call)
        patch.setattr(triton_plan, "SHORTEST_SPAN", shortest_span)
        yield


class TestTriton(TritonTests):
    environment = interpreted


class TestTritonInSpans(TritonTests):
    """With time cut into as many spans as there are chunks; only what carries states is different then."""

    environment = functools.partial(interpreted, shortest_span=1)
    cases = frozenset({"linear", "ssd", "gated"})

    # These do not depend on how time is cut.
    test_float32 = test_bfloat16 = test_inside_shard_map = test_documents_are_isolated_to_the_bit = None
    test_decays_from_nothing_to_everything = test_small_decays_after_a_large_one_keep_their_digits = None

    def can(self, name):
        return name in self.cases and super().can(name)

    def test_time_is_cut(self):
        plan = triton_plan.make_plan(triton_plan.Shape(2, 37, 2, 2, 2, 2, 4, 6), False, 8)
        assert (plan.spans, plan.length) == (3, 16)
