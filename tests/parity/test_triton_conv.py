"""The arithmetic and the memory traffic of the `triton` convolution, in Triton's interpreter; see test_triton_interpreter."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.backends import compiling_for
from lcx_kernels.causal_conv import causal_conv, triton_gpu
from tests.kernels.test_causal_conv import ConvTests, draw
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


def test_memory_traffic(record_property):
    """Over the least possible: x read, y written; x and dy read, dx written; bfloat16, of whole blocks and segments."""
    time, channels = 2 * triton_gpu.LENGTH, 256
    arguments = {name: jnp.asarray(value, jnp.bfloat16) for name, value in draw(1, time, channels, 4).items()}
    arguments["lookback"] = jnp.full((1, time), 3)
    arrays = {name: array for name, array in arguments.items() if name != "lookback"}
    tokens = arguments["x"].nbytes
    with interpreted(triton_gpu.LENGTH, triton_gpu.GROUP):
        run = lambda arrays: causal_conv(**arrays, lookback=arguments["lookback"], silu=True, backend="triton")  # noqa: E731
        before = INTERPRETER.moved
        outputs, pull = jax.vjp(run, arrays)
        jax.block_until_ready(outputs)
        forward = INTERPRETER.moved - before
        jax.block_until_ready(pull(outputs))
        sums = 4 * 5 * channels * 2  # read again, by the sums outside
        backward = INTERPRETER.moved - before - forward + sums
    ratios = forward / (2 * tokens), backward / (3 * tokens)
    record_property("row", {"convolution": "triton", "forward": f"{ratios[0]:.2f}", "backward": f"{ratios[1]:.2f}"})
    assert ratios[0] <= 1.1
    assert ratios[1] <= 1.2


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
