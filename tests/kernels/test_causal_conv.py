"""The depthwise causal convolution: every backend against a float64 loop over tokens and taps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.backends import BackendUnavailable
from lcx_kernels.causal_conv import causal_conv

BACKENDS = ["reference", "xla"]


def draw(batch, time, channels, width, *, tail=True, bias=True):
    rng = np.random.default_rng(0)
    arguments = {"x": rng.normal(size=(batch, time, channels)), "weight": rng.normal(size=(channels, width))}
    if bias:
        arguments["bias"] = rng.normal(size=(channels,))
    if tail:
        arguments["tail"] = rng.normal(size=(batch, width - 1, channels))
    return arguments


def loop(x, weight, bias=None, tail=None, lookback=None):
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
        outputs.append(y)
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


# The arguments, and the lookback.
CASES = {
    "usual": (draw(2, 6, 5, 4), random_lookback(2, 6)),
    "nothing optional": (draw(2, 4, 5, 3, tail=False, bias=False), None),
    "one token": (draw(1, 1, 3, 4), random_lookback(1, 1)),
    "shorter than the filter": (draw(2, 2, 3, 5), None),
    "width one": (draw(2, 4, 3, 1), random_lookback(2, 4)),
}


@functools.cache
def rounded(case, dtype):
    """The case's arguments and cotangents in ``dtype``, and what the loop makes of them in float64."""
    arguments, lookback = CASES[case]
    arguments = {name: jnp.asarray(value, dtype) for name, value in arguments.items()}
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(causal_conv, **arguments)
    cotangents = tuple(jnp.asarray(rng.normal(size=shape.shape), dtype) for shape in shapes)
    exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
    return arguments, cotangents, values_and_gradients(loop, *exact, lookback)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"), [(case, np.float64, 1e-12) for case in CASES] + [("usual", jnp.bfloat16, 8e-3)]
)
def test_against_the_loop(case, dtype, tolerance, backend):
    with jax.enable_x64(True):
        arguments, cotangents, expected = rounded(case, dtype)
        convolve = functools.partial(causal_conv, backend=backend)
        actual = values_and_gradients(convolve, arguments, cotangents, CASES[case][1])
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert value.dtype == dtype, name
            difference = np.linalg.norm(value.astype(jnp.float64) - expected[name])
            assert difference <= tolerance * max(np.linalg.norm(expected[name]), 1e-6), name


def test_the_last_weight_meets_the_current_token():
    x = jnp.arange(1.0, 5.0)[None, :, None]
    y, new_tail = causal_conv(x, jnp.array([[1000.0, 100.0, 10.0, 1.0]]))
    np.testing.assert_array_equal(y[0, :, 0], [1.0, 12.0, 123.0, 1234.0])
    np.testing.assert_array_equal(new_tail[0, :, 0], [2.0, 3.0, 4.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tail_continues_the_sequence(backend):
    arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 9, 5, 4).items()}
    conv = jax.jit(functools.partial(causal_conv, backend=backend))
    whole, last = conv(**arguments)
    for split in (2, 5):
        first, tail = conv(**arguments | {"x": arguments["x"][:, :split]})
        second, end = conv(**arguments | {"x": arguments["x"][:, split:], "tail": tail})
        np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(end, last)


def test_the_tail_keeps_its_dtype():
    arguments = {name: jnp.asarray(value, jnp.bfloat16) for name, value in draw(2, 3, 5, 4).items()}
    y, tail = causal_conv(**arguments | {"tail": arguments["tail"].astype(jnp.float32)})
    assert y.dtype == jnp.bfloat16
    assert tail.dtype == jnp.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", [5.0, np.nan])
def test_documents_are_isolated_to_the_bit(noise, backend):
    """A document from token 4 to 8 looks back no further than its start, whatever lies outside it."""
    arguments = {name: jnp.asarray(value, jnp.float32) for name, value in draw(2, 12, 3, 4).items()}
    positions = np.array([3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1, 2], np.int32)
    inside = slice(4, 9)
    outside = np.ones((1, 12, 1), bool)
    outside[:, inside] = False

    @jax.jit
    def run(x, tail, dy):
        def conv(x):
            lookback = np.stack([positions] * 2)
            return causal_conv(
                x, arguments["weight"], arguments["bias"], tail=tail, lookback=lookback, backend=backend
            )[0]

        y, transpose = jax.vjp(conv, x)
        return y, *transpose(dy)

    x, tail = arguments["x"], arguments["tail"]
    before = run(x, tail, x + 1)
    after = run(jnp.where(outside, noise, x), tail + noise, jnp.where(outside, noise, x + 1))
    for value, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(value[:, inside], other[:, inside])
        assert not np.array_equal(value[:, 9:], other[:, 9:])


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


def test_a_backend_that_is_not_there_is_refused():
    arguments = {key: jnp.asarray(value, jnp.float32) for key, value in draw(2, 9, 5, 4).items()}
    with pytest.raises(BackendUnavailable, match="pallas_tpu"):
        causal_conv(**arguments, backend="pallas_tpu")
