"""The arithmetic and the memory traffic of the `triton` selective scan, in Triton's interpreter.

The whole backend runs, from its arguments to the sums of its partial gradients, with every launch handed to the
interpreter in place of jax-triton: same kernels, grids, block sizes and order of arguments.
"""

import contextlib
import functools
import pickle
import struct
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcx_kernels.backends import BackendUnavailable, compiling_for
from lcx_kernels.selective_scan import selective_scan, triton_gpu, triton_plan
from tests import triton_traffic
from tests.kernels import test_selective_scan as base
from tests.kernels.test_selective_scan import ScanTests

pytestmark = pytest.mark.parity
pytest.importorskip("torch", reason="Triton's interpreter works on tensors of PyTorch")
pytest.importorskip("triton", reason="the kernels are written in Triton")


KERNELS = "lcx_kernels.selective_scan.triton_kernels"


class Interpreter:
    """The process that interprets kernels of a module, started when first used. Thread-safe."""

    def __init__(self, kernels: str = KERNELS):
        self._kernels, self._process, self._lock = kernels, None, threading.Lock()
        self.moved = 0  # bytes, by all launches so far

    def __call__(self, launch: triton_plan.Launch, *arrays, stretched: dict[int, int] | None = None):
        launch = launch._replace(inputs=[np.asarray(array) for array in arrays])
        request = (f"{self._kernels}:{launch.kernel}", launch.programs, *launch[3:], stretched or {})
        with self._lock:
            if self._process is None:
                command = [sys.executable, str(Path(__file__).parent / "triton_worker.py")]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            data = pickle.dumps(request)
            self._process.stdin.write(struct.pack("<q", len(data)) + data)
            self._process.stdin.flush()
            answer = pickle.loads(self._process.stdout.read(*struct.unpack("<q", self._process.stdout.read(8))))
        if isinstance(answer, str):
            raise RuntimeError(f"kernel {launch.kernel}:\n{answer}")
        outputs, moved = answer
        self.moved += moved
        return outputs

    def close(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=60)


INTERPRETER = Interpreter()


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    INTERPRETER.close()


def _call(launch: triton_plan.Launch) -> tuple[jax.Array, ...]:
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in launch.outputs]
    inputs, launch = launch.inputs, launch._replace(inputs=())
    return jax.pure_callback(functools.partial(INTERPRETER, launch), results, *inputs)


@contextlib.contextmanager
def interpreted(shortest_segment: int | None = None):
    """Lets `triton` be named here; time is cut into segments of at least so many tokens, else not at all."""
    # What was traced in another environment is not of this one.
    base.jitted.cache_clear()
    base.gradients_of_packed.cache_clear()
    with compiling_for("gpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gpu, "require", lambda: None)
        patch.setattr(triton_gpu, "_call", _call)
        patch.setattr(triton_plan, "SHORTEST_SEGMENT", shortest_segment or 2**31)
        yield


class InterpretedTests(ScanTests):
    backend = "triton"

    # A few of the draws: each launch takes a tenth of a second.
    test_stretches_compose = settings(
        max_examples=3, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow]
    )(given(data=st.data())(ScanTests.test_stretches_compose.hypothesis.inner_test))


class TestTriton(InterpretedTests):
    environment = interpreted

    @pytest.mark.parametrize("chunk_size", [1, 5, 8])
    def test_chunk_size_changes_nothing(self, chunk_size):
        self.compare("everything", chunk_size=chunk_size)

    @pytest.mark.parametrize("state", [1, 40])
    def test_state_sizes(self, state):
        """Other tiles, padded ones too, and several blocks of channels."""
        with jax.enable_x64(True):
            arguments = {name: jnp.asarray(value) for name, value in base.draw(1, 7, 70, state).items()}
            cotangents = base.cotangents_of(arguments, jnp.float64)
            scans = functools.partial(selective_scan, backend="triton"), base.sum_over_pairs
            results = [base.values_and_gradients(scan, arguments, cotangents, True) for scan in scans]
            base.assert_close(*results, 1e-10)

    def test_mixed_dtypes(self):
        """Every array is read in its own dtype, and its gradient has it."""
        narrow = {"x", "z", "B"}
        arguments, static = base.CASES["everything"]
        arguments = {
            name: jnp.asarray(value, jnp.bfloat16 if name in narrow else jnp.float32)
            for name, value in arguments.items()
        }
        cotangents = base.cotangents_of(arguments, jnp.bfloat16)
        scan = functools.partial(selective_scan, backend="triton")
        actual = base.values_and_gradients(scan, arguments, cotangents, **static)
        for name, value in actual.items():
            assert value.dtype == (jnp.bfloat16 if name == "y" or name[1:] in narrow else jnp.float32), name
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
            base.assert_close(actual, base.values_and_gradients(base.sum_over_pairs, *exact, **static), 4e-3)

    def test_too_large_a_state_is_refused(self):
        arguments = base.in_float32(base.draw(1, 2, 1, 129))
        with pytest.raises(BackendUnavailable, match="A has 129 states a channel, and it takes at most 128"):
            selective_scan(**arguments, backend="triton")


class TestTritonInSegments(InterpretedTests):
    """With time cut into as many segments as chunks allow."""

    chunk_size = 4
    environment = functools.partial(interpreted, shortest_segment=4)

    def test_time_is_cut(self):
        plan = triton_plan.make_plan(2, 37, 6, 3, False, 4)
        assert (plan.segments, plan.length) == (5, 8)


def draw_inputs(batch, time, channels, state) -> triton_plan.Inputs:
    """numpy arrays; what a model gives: bfloat16 for what is per token, float32 for the rest."""
    values = base.draw(batch, time, channels, state)
    wide = {"A", "D", "dt_bias", "initial_state"}
    values = {name: np.asarray(jnp.asarray(value, jnp.float32 if name in wide else jnp.bfloat16))
              for name, value in values.items()}  # fmt: skip
    return triton_plan.Inputs(**values, reset=base.mark_resets(batch, time, 3).astype(np.int8))


def run_directly(launch, **options):
    return INTERPRETER(launch._replace(inputs=()), *launch.inputs, **options)


@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.parametrize("segments", [1, 3])
def test_memory_traffic_is_as_counted(segments, with_y):
    """The count of `triton_traffic`, by which the limits are checked, is what the programs load and store."""
    inputs = draw_inputs(2, 19, 130, 5) if segments == 1 else draw_inputs(1, 37, 130, 5)
    inputs = inputs if with_y else inputs._replace(C=None, D=None, z=None)
    plan = triton_plan.make_plan(*inputs.sizes, False, None)
    cut = triton_plan.Cut(segments, 32 if segments == 1 else 16)
    plan = plan._replace(segments=cut.segments, length=cut.length, back=cut)
    counted = []

    def run(launch):
        before = INTERPRETER.moved
        outputs = run_directly(launch)
        assert INTERPRETER.moved - before == triton_traffic.moved(launch), launch.kernel
        counted.append(launch.kernel)
        return outputs

    y, final, borders = triton_plan.forward(run, inputs, True, plan, True)
    triton_plan.backward(run, inputs, True, plan, borders, y, final)
    expected = triton_traffic.passes(inputs, plan)
    launches = expected["keeping"].launches + expected["backward"].launches
    assert counted == [launch.kernel for launch in launches]
    assert set(counted) >= ({"forward", "backward"} if segments == 1 else {"forward", "backward", "adjoint", "combine"})


@pytest.mark.parametrize(("time", "batch_fills"), [(4096, True), (4096, False), (32768, False)])
def test_memory_traffic(time, batch_fills, record_property):
    """Of Mamba-130M's 1536 channels. In bfloat16, where partial sums and states in float32 weigh most."""
    inputs = triton_traffic.abstract_inputs(32 if batch_fills else 1, time, 1536, 16, jnp.bfloat16)
    plan = triton_plan.make_plan(*inputs.sizes, False, None)
    assert (plan.segments > 1) == (not batch_fills)
    ratios = {name: each.ratio for name, each in triton_traffic.passes(inputs, plan).items()}
    row = {"channels": 1536, "time": time, "segments": plan.segments}
    record_property("row", row | {name: f"{ratio:.2f}" for name, ratio in ratios.items()})
    cut = "" if batch_fills else ", cut"
    assert max(ratios["forward"], ratios["keeping"]) <= triton_traffic.LIMITS["forward" + cut]
    assert ratios["backward"] <= triton_traffic.LIMITS["backward" + cut]


def test_offsets_beyond_two_to_the_31():
    """In rows of 2^31 numbers each, of which only the first tokens are run."""
    inputs = draw_inputs(2, 48, 64, 4)
    plan = triton_plan.make_plan(*inputs.sizes, False, None)._replace(segments=1, length=48)
    assert plan.chunk == 8
    long = 2**25

    def run_far(launch):
        scalars = tuple(long if scalar == 48 and i == 0 else scalar for i, scalar in enumerate(launch.scalars))
        return run_directly(launch._replace(scalars=scalars), stretched={48: long, 6: long // 8})

    near, far = [], []
    for run, results in ((run_directly, near), (run_far, far)):
        y, final, borders = triton_plan.forward(run, inputs, True, plan, True)
        results += [y, final, borders, *triton_plan.backward(run, inputs, True, plan, borders, y, final)[:9]]
    for a, b in zip(near, far, strict=True):
        np.testing.assert_array_equal(a, b)
