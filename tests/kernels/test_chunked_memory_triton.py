"""The `triton` chunked memory on a GPU, its refusals, and what is missing.

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
from lcx_kernels.chunked_memory import chunked_memory, triton_gpu, triton_plan
from tests.kernels import test_chunked_memory as base
from tests.kernels.test_chunked_memory import MemoryTests


class TritonTests(MemoryTests):
    backend = "triton"
    refused = frozenset(
        {"gated, one row, normalized", "gated_delta_rule, channels", "infini, decay", "infini_delta, inclusive"}
    )

    tolerances = {jnp.float64: 1e-5, jnp.float32: 1e-5, jnp.bfloat16: 1e-2}

    @pytest.fixture(autouse=True)
    def _in_float32(self, monkeypatch):
        """It has no float64: what the base draws in float64 is float32 here, and as close as that may be."""
        cast, cotangents_of, assert_close = base.cast, base.cotangents_of, base.assert_close
        narrow = lambda dtype: jnp.float32 if dtype == jnp.float64 else dtype  # noqa: E731
        monkeypatch.setattr(base, "cast", lambda arguments, dtype: cast(arguments, narrow(dtype)))
        monkeypatch.setattr(base, "cotangents_of", lambda case, dtype, *rest: cotangents_of(case, narrow(dtype), *rest))
        monkeypatch.setattr(
            base,
            "assert_close",
            lambda one, other, tolerance: assert_close(one, other, max(tolerance, 1e-5)),
        )

    def compare(self, name, dtype=jnp.float32):
        super().compare(name, jnp.float32 if dtype == jnp.float64 else dtype)

    @pytest.mark.parametrize("name", ["ssd", "gated", "gated_delta_rule"])
    def test_small_decays_after_a_large_one_keep_their_digits(self, name):
        """Sums from the head of a chunk would have lost them."""
        if not self.can(name):
            return
        case = base.KINDS[name]._replace(time=16, rates=(1e-3, 1e-1), resets=((), ()))
        arguments, cotangents = base.draw(case), base.cotangents_of(case, jnp.float32)
        arguments["log_decay"][:, 1] = -9000.0
        arguments = base.cast(arguments, jnp.float32)
        actual = base.by_name(self.pull(case, arguments, cotangents))
        exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
        memory = functools.partial(chunked_memory, backend="reference")
        expected = base.by_name(base.outputs_and_gradients(memory, case, *exact))
        del actual["['d']['initial_state']"]  # 0 but for what underflows
        del expected["['d']['initial_state']"]
        base.assert_close(actual, expected, 1e-5)


@pytest.mark.gpu
class TestTriton(TritonTests):
    @pytest.fixture(autouse=True)
    def _gpu(self):
        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU")
        base.pulled.cache_clear()
        base.outputs_and_gradients.clear_cache()

    def test_inside_shard_map(self, name="ssd"):
        if jax.device_count() < 4:
            pytest.skip("needs four GPUs")
        super().test_inside_shard_map(name)

    @pytest.mark.parametrize("name", ["ssd", "gated_delta_rule"])
    def test_runs_are_equal_to_the_bit(self, name):
        case = base.KINDS[name]._replace(time=700, widths=(64, 128))
        arguments, cotangents = base.cast((base.draw(case), base.cotangents_of(case, jnp.float32)), jnp.float32)
        first, again = (base.by_name(self.pull(case, arguments, cotangents)) for _ in range(2))
        for key, value in first.items():
            np.testing.assert_array_equal(value, again[key], err_msg=key)


@pytest.mark.gpu
class TestTritonInSpans(TestTriton):
    @pytest.fixture(autouse=True)
    def _short_spans(self, monkeypatch):
        monkeypatch.setattr(triton_plan, "SHORTEST_SPAN", 1)


@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_what_is_missing_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    case = base.KINDS["ssd"]
    arguments = base.cast(base.draw(case), jnp.float32)
    message = 'backend "triton" needs triton, jax-triton and JAX\'s CUDA plugin; importing .*triton says: '
    with compiling_for("gpu"), pytest.raises(BackendUnavailable, match=message):
        chunked_memory(**arguments, **case.options(), **case.marks(), backend="triton")


def test_float64_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(triton_gpu, "require", lambda: None)
    case = base.KINDS["ssd"]
    with jax.enable_x64(True), compiling_for("gpu"):
        arguments = {name: jnp.asarray(value) for name, value in base.draw(case).items()}
        with pytest.raises(BackendUnavailable, match="float64"):
            chunked_memory(**arguments, **case.options(), **case.marks(), backend="triton")
        out, _ = chunked_memory(**arguments, **case.options(), **case.marks())
        assert out.dtype == jnp.float64


def test_importing_the_kernels_imports_no_triton():
    code = (
        "import sys, lcx_kernels.chunked_memory\n"
        "assert not {'triton', 'jax_triton', 'torch'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_large_sizes_are_planned():
    """A GPU is full at batch 1, and a grid holds 2^31 programs."""
    shape = triton_plan.Shape(1, 2**20, 32, 1, 1, 32, 128, 64)
    plan = triton_plan.make_plan(shape, True, 256)
    assert plan.chunk == 64
    assert plan.spans * plan.length >= 2**20 > (plan.spans - 1) * plan.length
    assert plan.length % plan.chunk == 0
    assert plan.spans * 32 * 2 >= triton_plan.WANTED_PROGRAMS
    assert triton_plan.make_plan(shape._replace(batch=16, time=4096), True, 256).spans == 1
    with pytest.raises(ValueError, match="more than a grid has"):
        triton_plan.programs(2**31)
