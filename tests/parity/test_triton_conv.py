"""The arithmetic and the memory traffic of the `triton` convolution, in Triton's interpreter."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from lcx_kernels.backends import compiling_for
from lcx_kernels.causal_conv import triton_gpu
from tests import triton_traffic
from tests.kernels.test_causal_conv import ConvTests
from tests.parity.test_triton_interpreter import Interpreter

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="Triton's interpreter works on tensors of PyTorch")
pytest.importorskip("triton", reason="the kernels are written in Triton")

INTERPRETER = Interpreter("lcx_kernels.causal_conv.triton_kernels")


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    INTERPRETER.close()


def _call(launch: triton_gpu.Launch) -> tuple[jax.Array, ...]:
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in launch.outputs]
    inputs, launch = launch.inputs, launch._replace(inputs=())
    return jax.pure_callback(functools.partial(INTERPRETER, launch), results, *inputs)


@contextlib.contextmanager
def interpreted(length: int = 16, group: int = 4):
    """Lets `triton` be named here, with segments and groups so short that tests cross them."""
    with compiling_for("gpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gpu, "missing", lambda: None)
        patch.setattr(triton_gpu, "_call", _call)
        patch.setattr(triton_gpu, "LENGTH", length)
        patch.setattr(triton_gpu, "GROUP", group)
        yield


class TestTriton(ConvTests):
    backend = "triton"
    environment = interpreted


@pytest.mark.parametrize("limited", [True, False])
def test_memory_traffic_is_as_counted(limited):
    """The count of `triton_traffic`, which tests/aot prints and limits, is what the programs load and store."""
    rng, batch = np.random.default_rng(0), 1 + limited
    x, tail, dy = (rng.normal(size=(batch, time, 260)).astype(np.float32) for time in (37, 3, 37))
    weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((260, 4), (260,)))
    lookback = rng.integers(0, 5, (batch, 37)).astype(np.int32) if limited else None
    arrays, shape = (x, tail, weight, bias, lookback), (x.shape, np.float32)
    sums = ((tail.shape, np.float32), ((batch, 3, 5, 260), np.float32))
    with interpreted():
        launches = [
            triton_gpu._launch("forward", True, *arrays, (), (shape,)),
            triton_gpu._launch("backward", True, *arrays, (dy,), (shape, *sums)),
        ]
    for launch in launches:
        before = INTERPRETER.moved
        INTERPRETER(launch._replace(inputs=()), *launch.inputs)
        assert INTERPRETER.moved - before == triton_traffic.moved_by_convolution(launch), launch.kernel


def test_offsets_beyond_two_to_the_31():
    """In rows of 2^31 numbers each, of which only the first tokens are run."""
    rng = np.random.default_rng(0)
    time, channels, long = 48, 64, 2**25
    tokens, tail = (rng.normal(size=(2, length, channels)).astype(np.float32) for length in (time, 3))
    weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((channels, 4), (channels,)))
    with interpreted():
        shape = (tokens.shape, np.float32)
        forward = triton_gpu._launch("forward", True, tokens, tail, weight, bias, None, (), (shape,))
    near, far = (
        INTERPRETER(
            forward._replace(inputs=(), scalars=(length, *forward.scalars[1:])),
            *forward.inputs,
            stretched={} if length == time else {time: long},
        )
        for length in (time, long)
    )
    np.testing.assert_array_equal(near[0], far[0])
