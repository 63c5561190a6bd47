"""The `triton` selective scan on a GPU, and its refusal where something is missing.

tests/parity has its arithmetic on any machine, tests/aot has it compiled.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.backends import BackendUnavailable, compiling_for
from lcx_kernels.selective_scan import selective_scan, triton_plan
from tests.kernels import test_selective_scan as base
from tests.kernels.test_selective_scan import ScanTests


class OnGpu(ScanTests):
    backend = "triton"

    @pytest.fixture(autouse=True)
    def _gpu(self):
        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU")
        base.jitted.cache_clear()
        base.gradients_of_packed.cache_clear()

    # GPUs approximate exp2 to two units in the last place.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 8e-3)])
    def test_lower_precisions(self, dtype, tolerance):
        self.compare("everything", dtype=dtype, tolerance=tolerance)

    def test_inside_shard_map(self):
        if jax.device_count() < 4:
            pytest.skip("needs four GPUs")
        super().test_inside_shard_map()

    def test_runs_are_equal_to_the_bit(self):
        arguments = base.in_float32(base.draw(2, 700, 200, 16))
        cotangents = base.cotangents_of(arguments, jnp.float32)
        scan = functools.partial(selective_scan, backend="triton")
        first, again = (base.values_and_gradients(scan, arguments, cotangents, True) for _ in range(2))
        for name, value in first.items():
            np.testing.assert_array_equal(value, again[name], err_msg=name)


@pytest.mark.gpu
class TestTriton(OnGpu):
    pass


@pytest.mark.gpu
class TestTritonInSegments(OnGpu):
    chunk_size = 4

    @pytest.fixture(autouse=True)
    def _short_segments(self, monkeypatch):
        monkeypatch.setattr(triton_plan, "SHORTEST_SEGMENT", 4)


@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_what_is_missing_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    arguments = base.in_float32(base.draw(2, 5, 3, 4))
    message = 'backend "triton" needs triton, jax-triton and JAX\'s CUDA plugin; importing .*triton says: '
    with compiling_for("gpu"), pytest.raises(BackendUnavailable, match=message):
        selective_scan(**arguments, backend="triton")


def test_importing_the_kernels_imports_no_triton():
    code = (
        "import sys, lcx_kernels.selective_scan\n"
        "assert not {'triton', 'jax_triton', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_large_sizes_are_planned():
    """A grid holds 2^31 programs, and no plan cuts time into pieces shorter than they are worth."""
    plan = triton_plan.make_plan(1, 2**20, 5120, 16, False, None)
    assert plan.segments * plan.length >= 2**20 > (plan.segments - 1) * plan.length
    assert plan.length % plan.chunk == 0
    assert plan.length >= triton_plan.SHORTEST_SEGMENT
    assert plan.segments * -(-5120 // plan.forward.block) >= triton_plan.WANTED_PROGRAMS
    assert triton_plan.make_plan(512, 4096, 1536, 16, False, None).segments == 1
    with pytest.raises(ValueError, match="more than a grid has"):
        triton_plan._programs(plan, plan.forward, 2**26, 5120)
