"""What the selective scan refuses, and that it loads no more than it needs."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.backends import BackendUnavailable, compiling_for
from lcx_kernels.selective_scan import select_backend, selective_scan
from tests.kernels.test_selective_scan import draw, in_float32

WRONG = {
    "x": (np.zeros((2, 5), np.float32), r"x: shape \(2, 5\), expected \[batch, time, channels\]"),
    "dt": (np.zeros((2, 5, 1), np.float32), r"dt: shape \(2, 5, 1\), expected \[batch, time, channels\] = \(2, 5, 3\)"),
    "A": (np.zeros((4, 3), np.float32), r"A: shape \(4, 3\), expected \[channels, state\]"),
    "B": (np.zeros((2, 5, 7), np.float32), r"B: shape \(2, 5, 7\), expected \[batch, time, state\]"),
    "C": (np.zeros((2, 4, 4), np.float32), r"C: shape \(2, 4, 4\), expected \[batch, time, state\]"),
    "D": (np.zeros((3, 1), np.float32), r"D: shape \(3, 1\), expected \[channels\]"),
    "z": (np.zeros((2, 5, 3), np.int32), r"z: int32 of shape \(2, 5, 3\), expected .* of floating"),
    "dt_bias": (np.zeros((1,), np.float32), r"dt_bias: shape \(1,\), expected \[channels\]"),
    "initial_state": (np.zeros((2, 4, 3), np.float32), r"initial_state: shape \(2, 4, 3\), expected .* = \(2, 3, 4\)"),
    "reset": (np.zeros((2, 5), np.int32), r"reset: int32 of shape \(2, 5\), expected \[batch, time\] of bool"),
    "chunk_size": (0, "chunk_size: 0, expected at least 1"),
    "backend": ("cuda", "backend: unknown name 'cuda', expected \"auto\" or one of: reference, xla"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    value, message = WRONG[name]
    arguments = in_float32(draw(2, 5, 3, 4))
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments | {name: value})


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        selective_scan(**in_float32(draw(2, 0, 3, 4)))


def test_a_backend_for_another_platform_is_refused():
    arguments = in_float32(draw(2, 5, 3, 4))
    with pytest.raises(BackendUnavailable, match='backend "pallas_tpu" needs a TPU, and this platform is "cpu"'):
        selective_scan(**arguments, backend="pallas_tpu")


CANNOT = {
    "float64 on TPU": ("tpu", "pallas_tpu", 4, jnp.float64, 'backend "pallas_tpu" cannot do this call: .* no float64'),
    "too many states": ("gpu", "triton", 129, jnp.float32, "A has 129 states a channel, and it takes at most 128"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_calls_that_a_backend_cannot_do_are_refused(case):
    """By name, also before there are arrays; "auto" is XLA then."""
    platform, backend, state, dtype, message = CANNOT[case]
    with jax.enable_x64(True), compiling_for(platform):
        arguments = {key: jnp.asarray(value, dtype) for key, value in draw(2, 9, 3, state).items()}
        with pytest.raises(BackendUnavailable, match=message):
            jax.eval_shape(functools.partial(selective_scan, backend=backend), **arguments)
        with pytest.raises(BackendUnavailable, match=message):
            select_backend(backend, state=state, dtype=dtype)
        assert select_backend("auto", state=state, dtype=dtype) == "xla"
        jax.eval_shape(selective_scan, **arguments)


def test_kernels_are_imported_when_they_run():
    code = "import sys, lcx_kernels.selective_scan; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "lcx_kernels.selective_scan.xla" in loaded
    assert not [name for name in loaded if name.startswith(("jax.experimental.pallas", "jax_triton", "triton"))]
