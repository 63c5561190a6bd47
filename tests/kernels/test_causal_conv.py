"""The depthwise causal convolution: every backend against a float64 loop over tokens and taps.

`ConvTests` holds what is asked of a backend; each backend is a subclass, here or in a file of its own.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from lcx_kernels.backends import BackendUnavailable, compiling_for, interpreted
from lcx_kernels.causal_conv import causal_conv


def draw(batch, time, channels, width, *, tail=True, bias=True):
    rng = np.random.default_rng(0)
    arguments = {"x": rng.normal(size=(batch, time, channels)), "weight": rng.normal(size=(channels, width))}
    if bias:
        arguments["bias"] = rng.normal(size=(channels,))
    if tail:
        arguments["tail"] = rng.normal(size=(batch, width - 1, channels))
    return arguments


def loop(x, weight, bias=None, tail=None, lookback=None, silu=False):
    """Token by token and tap by tap."""
    batch, time, channels = x.shape
    width = weight.shape[1]
    before = jnp.zeros((batch, width - 1, channels), x.dtype) if tail is None else tail
    tokens = [before[:, i] for i in range(width - 1)] + [x[:, t] for t in range(time)]
    outputs = []
    for t in range(time):
        y = jnp.zeros((batch, channels), x.dtype) if bias is None else jnp.broadcast_to(bias, (batch, channels))
        for distance in range(width):
            seen = tokens[t + width - 1 - distance]
            if lookback is not None:
                seen = seen * (distance <= lookback[:, t])[:, None]
            y = y + weight[:, width - 1 - distance] * seen
        outputs.append(y / (1 + jnp.exp(-y)) if silu else y)
    new_tail = tokens[len(tokens) - (width - 1) :]
    return jnp.stack(outputs, axis=1), jnp.stack(new_tail, axis=1) if new_tail else before


def values_and_gradients(function, arguments, cotangents, lookback):
    def run(arguments, cotangents):
        outputs, transpose = jax.vjp(lambda arguments: function(**arguments, lookback=lookback), arguments)
        return outputs, transpose(cotangents)[0]

    (y, new_tail), gradients = jax.jit(run)(arguments, cotangents)
    return {"y": y, "new_tail": new_tail} | {f"d{name}": gradient for name, gradient in gradients.items()}


def random_lookback(batch, time):
    return np.random.default_rng(1).integers(0, 5, size=(batch, time)).astype(np.int32)


# The arguments, the lookback, and whether silu follows.
CASES = {
    "usual": (draw(2, 6, 5, 4), random_lookback(2, 6), False),
    "silu": (draw(2, 6, 5, 4), random_lookback(2, 6), True),
    "nothing optional": (draw(2, 4, 5, 3, tail=False, bias=False), None, True),
    "one token": (draw(1, 1, 3, 4), random_lookback(1, 1), True),
    "shorter than the filter": (draw(2, 2, 3, 5), None, False),
    "width one": (draw(2, 4, 3, 1), random_lookback(2, 4), False),
    # Over several chunks and segments of the kernels, the last one ragged, and over several groups of lanes.
    "long": (draw(2, 35, 6, 4), random_lookback(2, 35), True),
    "widest filter": (draw(1, 20, 3, 9), None, True),
    "many channels, whole chunks": (draw(1, 32, 140, 2), random_lookback(1, 32), True),
}


@functools.cache
def rounded(case, dtype):
    """The case's arguments and cotangents in ``dtype``, and what the loop makes of them in float64."""
    arguments, lookback, silu = CASES[case]
    arguments = {name: jnp.asarray(value, dtype) for name, value in arguments.items()}
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(functools.partial(causal_conv, backend="xla"), **arguments)
    cotangents = tuple(jnp.asarray(rng.normal(size=shape.shape), dtype) for shape in shapes)
    exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
    return arguments, cotangents, values_and_gradients(functools.partial(loop, silu=silu), *exact, lookback)


class ConvTests:
    """The laws and cases of a backend; subclasses say which.

    Attributes:
      backend: its name.
      check_vma: whether the axes of a shard_map around the backend are checked.
      environment: makes the context in which it can run here.
    """

    backend: str
    check_vma = True
    environment = contextlib.nullcontext

    @pytest.fixture(autouse=True)
    def _environment(self):
        with type(self).environment():
            yield

    @pytest.mark.parametrize(
        ("case", "dtype", "tolerance"),
        [(case, np.float64, 1e-12) for case in CASES] + [("long", jnp.bfloat16, 8e-3)],
    )
    def test_against_the_loop(self, case, dtype, tolerance):
        with jax.enable_x64(True):
            arguments, cotangents, expected = rounded(case, dtype)
            _, lookback, silu = CASES[case]
            convolve = functools.partial(causal_conv, backend=self.backend, silu=silu)
            actual = values_and_gradients(convolve, arguments, cotangents, lookback)
            assert actual.keys() == expected.keys()
            for name, value in actual.items():
                assert value.dtype == dtype, name
                difference = np.linalg.norm(value.astype(jnp.float64) - expected[name])
                assert difference <= tolerance * max(np.linalg.norm(expected[name]), 1e-6), name

    def test_the_tail_continues_the_sequence(self):
        arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 9, 5, 4).items()}
        conv = jax.jit(functools.partial(causal_conv, backend=self.backend))
        whole, last = conv(**arguments)
        for split in (2, 5):
            first, tail = conv(**arguments | {"x": arguments["x"][:, :split]})
            second, end = conv(**arguments | {"x": arguments["x"][:, split:], "tail": tail})
            np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(end, last)

    def test_every_array_keeps_its_dtype(self):
        """Also where they differ: each is read in its own, and its gradient has it."""
        arguments = {name: jnp.asarray(value, jnp.bfloat16) for name, value in draw(2, 5, 5, 4).items()}
        arguments |= {name: arguments[name].astype(jnp.float32) for name in ("tail", "weight")}
        y, tail = jax.eval_shape(functools.partial(causal_conv, backend=self.backend), **arguments)
        assert (y.dtype, tail.dtype) == (jnp.bfloat16, jnp.float32)
        rng = np.random.default_rng(4)
        cotangents = tuple(jnp.asarray(rng.normal(size=array.shape), array.dtype) for array in (y, tail))
        convolve = functools.partial(causal_conv, backend=self.backend)
        found = values_and_gradients(convolve, arguments, cotangents, None)
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
            expected = values_and_gradients(loop, *exact, None)
        for name, value in found.items():
            wide = name in ("new_tail", "dtail", "dweight")
            assert value.dtype == (jnp.float32 if wide else jnp.bfloat16), name
            np.testing.assert_allclose(
                np.asarray(value, np.float64), expected[name], rtol=2e-2, atol=2e-2, err_msg=name
            )

    @pytest.mark.parametrize("noise", [5.0, np.nan])
    def test_documents_are_isolated_to_the_bit(self, noise):
        """A document from token 4 to 8 looks back no further than its start, whatever lies outside it."""
        arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 12, 3, 4).items()}
        positions = np.array([3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1, 2], np.int32)
        inside = slice(4, 9)
        outside = np.ones((1, 12, 1), bool)
        outside[:, inside] = False

        @jax.jit
        def run(x, tail, dy):
            def conv(x):
                options = {"tail": tail, "lookback": np.stack([positions] * 2), "silu": True}
                return causal_conv(x, arguments["weight"], arguments["bias"], **options, backend=self.backend)[0]

            y, transpose = jax.vjp(conv, x)
            return y, *transpose(dy)

        x, tail = arguments["x"], arguments["tail"]
        before = run(x, tail, x + 1)
        after = run(jnp.where(outside, noise, x), tail + noise, jnp.where(outside, noise, x + 1))
        for value, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(value[:, inside], other[:, inside])
            assert not np.array_equal(value[:, 9:], other[:, 9:])

    def test_inside_shard_map(self):
        """Over batch and channels; weights are shared, and an absent tail is made inside."""
        arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 9, 4, 4, tail=False).items()}
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        tokens, channels = PartitionSpec("data", None, "tensor"), PartitionSpec("tensor")
        specs = {"x": tokens, "weight": channels, "bias": channels}

        def convolve(arguments, lookback, backend=self.backend):
            return causal_conv(**arguments, lookback=lookback, silu=True, backend=backend)[0]

        mapped = jax.shard_map(
            convolve, mesh=mesh, in_specs=(specs, PartitionSpec("data")), out_specs=tokens, check_vma=self.check_vma
        )
        whole = functools.partial(convolve, backend="xla")
        losses = [
            lambda arguments, run=run: (run(arguments, random_lookback(2, 9)) ** 2).sum() for run in (mapped, whole)
        ]
        actual, expected = (jax.jit(jax.grad(loss))(arguments) for loss in losses)
        for name, value in actual.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


class TestReference(ConvTests):
    backend = "reference"


class TestXla(ConvTests):
    backend = "xla"


class TestCpp(ConvTests):
    backend = "cpp"


class TestPallasTpu(ConvTests):
    """The kernel's arithmetic, interpreted on CPU; tests/aot has it compiled for TPU."""

    backend = "pallas_tpu"
    check_vma = False  # JAX's interpreter of kernels does not track axes
    environment = interpreted

    def test_simulated(self, monkeypatch):
        """In JAX's simulator of a TPU's memories: nothing is read before it is written or outside of a buffer."""
        strict = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
        pallas_call, simulated = pl.pallas_call, []

        def simulate(*args, interpret, **options):
            simulated.append(options["name"])
            return pallas_call(*args, interpret=strict, **options)

        monkeypatch.setattr(pl, "pallas_call", simulate)
        self.test_against_the_loop("long", jnp.bfloat16, 8e-3)
        assert simulated == ["causal_conv_backward"]


def test_the_last_weight_meets_the_current_token():
    x = jnp.arange(1.0, 5.0)[None, :, None]
    y, new_tail = causal_conv(x, jnp.array([[1000.0, 100.0, 10.0, 1.0]]))
    np.testing.assert_array_equal(y[0, :, 0], [1.0, 12.0, 123.0, 1234.0])
    np.testing.assert_array_equal(new_tail[0, :, 0], [2.0, 3.0, 4.0])


WRONG = {
    "x": (np.zeros((2, 9), np.float32), r"x: shape \(2, 9\), expected \[batch, time, channels\]"),
    "weight": (np.zeros((4, 5), np.float32), r"weight: shape \(4, 5\), expected \[channels, width\] = \(5, any\)"),
    "bias": (np.zeros((4,), np.float32), r"bias: shape \(4,\), expected \[channels\] = \(5\)"),
    "tail": (np.zeros((2, 4, 5), np.float32), r"tail: shape \(2, 4, 5\), expected .* = \(2, 3, 5\)"),
    "lookback": (np.zeros((2, 9), np.float32), r"lookback: float32 of shape \(2, 9\), expected .* of integer"),
    "backend": ("fast", "backend: unknown name 'fast'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    value, message = WRONG[name]
    arguments = {key: jnp.asarray(value, jnp.float32) for key, value in draw(2, 9, 5, 4).items()}
    with pytest.raises(ValueError, match=message):
        causal_conv(**arguments | {name: value})


def test_a_backend_for_another_platform_is_refused():
    arguments = {key: jnp.asarray(value, jnp.float32) for key, value in draw(2, 9, 5, 4).items()}
    with pytest.raises(BackendUnavailable, match='backend "pallas_tpu" needs a TPU, and this platform is "cpu"'):
        causal_conv(**arguments, backend="pallas_tpu")


def test_calls_that_a_backend_cannot_do_are_refused():
    """By name; "auto" is another backend then."""

    def trace(backend, dtype=jnp.float32, width=4):
        arguments = {key: jax.ShapeDtypeStruct(value.shape, dtype) for key, value in draw(2, 9, 5, width).items()}
        return str(jax.make_jaxpr(functools.partial(causal_conv, backend=backend))(**arguments))

    with compiling_for("tpu"), jax.enable_x64(True):
        with pytest.raises(BackendUnavailable, match='backend "pallas_tpu" has no float64'):
            trace("pallas_tpu", jnp.float64)
        with pytest.raises(BackendUnavailable, match="at most 9 taps, and these have 10"):
            trace("pallas_tpu", width=10)
        trace("auto", jnp.float64)
        trace("auto", width=10)
