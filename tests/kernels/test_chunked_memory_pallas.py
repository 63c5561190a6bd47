"""The chunked memory's Pallas kernels for TPU, interpreted on CPU; tests/aot has them compiled for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx_kernels.backends import BackendUnavailable, compiling_for, interpreted
from lcx_kernels.chunked_memory import chunked_memory, pallas_tpu, reference
from lcx_kernels.chunked_memory.api import gather
from lcx_kernels.chunked_memory.arguments import Static
from lcx_kernels.chunked_memory.pallas_inverse import unit_lower_inverse
from lcx_kernels.chunked_memory.pallas_tiles import dot
from tests.kernels.test_chunked_memory import (
    CASES,
    DELTA_RULE,
    INFINI,
    INFINI_DELTA,
    KINDS,
    RATES,
    SCATTERED,
    MemoryTests,
    assert_close,
    by_name,
    case,
    cotangents_of,
    draw,
    outputs_and_gradients,
    sum_over_pairs,
)

# Heads as they meet in registers: two in 64 lanes each, or one in 128; with keys of their own, or shared.
LAYOUTS = {
    "two heads a register": case(16, heads=(4, 4, 4), rates=RATES, static={"normalize": True}, resets=SCATTERED),
    "one head": case(16, heads=(3, 3, 3), rates=RATES, resets=SCATTERED),
    "two of keys, one of values": case(32, heads=(2, 2, 2), widths=(3, 70), static=DELTA_RULE, rates=RATES),
    "one of keys, two of values": case(16, heads=(2, 2, 2), widths=(70, 3), static={"normalize": True}),
    "a decay a channel, one head a register": case(
        50, heads=(3, 1, 3), widths=(5, 70), time=70, rates=RATES, channels=True, resets=SCATTERED
    ),
    "three values share keys": case(16, heads=(2, 2, 6), static={"normalize": True}, resets=SCATTERED),
    "programs share keys": case(16, heads=(1, 1, 4), batch=1, rates=RATES, resets=((5,),)),
    "six tiles a program": case(16, heads=(1, 1, 24), time=18, batch=1, rates=RATES),
    "queries of one memory": case(20, heads=(4, 2, 2), static=INFINI_DELTA, first_positions=(7, 19), resets=SCATTERED),
    "three queries a memory": case(20, heads=(6, 2, 2), static=INFINI, first_positions=(7, 0)),
    "queries of two memories": case(
        20, heads=(2, 2, 2), widths=(70, 3), static=INFINI_DELTA, first_positions=(7, 0), resets=SCATTERED
    ),
    "chunks shorter than segments": case(
        90, heads=(4, 2, 2), time=200, static=INFINI_DELTA, first_positions=(80, 0), resets=((120,), (3, 190))
    ),
}
DEFAULTS = {"update": "linear", "read": "inclusive", "normalize": False}
SLOW = pytest.mark.slow  # what `make drills` runs, not `make test`: kernels take long to interpret
QUICK = ("one of keys, two of values", "queries of one memory")
QUICK_CASES = ("linear", "ssd", "gated", "delta_rule", "gated_delta_rule", "ssd, one token", "infini", "infini_delta")


def some_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=SLOW) for name in names]


class TestPallasTpu(MemoryTests):
    backend = "pallas_tpu"
    refused = frozenset(
        {
            "linear",
            "gated, one row, normalized",
            "gated_delta_rule, channels",
            "infini, decay",
            "infini_delta, inclusive",
        }
    )
    check_vma = False  # JAX's interpreter of kernels does not track axes
    environment = interpreted

    @pytest.mark.parametrize("name", some_slow(CASES, QUICK_CASES))
    def test_float64(self, name):
        self.compare(name)

    @pytest.mark.parametrize("name", some_slow(["ssd", "gated", "infini"], ["ssd", "infini"]))
    def test_bfloat16(self, name):
        super().test_bfloat16(name)

    @SLOW
    @pytest.mark.parametrize("name", KINDS)
    def test_a_row_may_be_cut_anywhere(self, name):
        super().test_a_row_may_be_cut_anywhere(name)

    @pytest.mark.parametrize("name", some_slow(["ssd", "gated_delta_rule", "infini_delta"], ["ssd"]))
    def test_inside_shard_map(self, name):
        super().test_inside_shard_map(name)

    @pytest.mark.parametrize("name", some_slow(LAYOUTS, QUICK))
    def test_layouts(self, name):
        compare(LAYOUTS[name], jnp.float64, 1e-10)

    @pytest.mark.parametrize("name", some_slow(["two heads a register", *KINDS], ["two heads a register"]))
    def test_states_without_queries(self, name):
        """As summaries ask for: the final state and its gradients, where nothing is read."""
        of_case = (KINDS | LAYOUTS)[name]
        static = Static(**DEFAULTS | of_case.options())
        if name in KINDS and not self.can(name):
            return
        with jax.enable_x64(True):
            given = jax.tree.map(jnp.asarray, draw(of_case))
            found = []
            for scan in (pallas_tpu.scan, reference.scan):

                def final(given, scan=scan):
                    names = ("k", "v", "log_decay", "beta", "positions", "reset", "initial_state")
                    arrays = given | of_case.marks()
                    return scan(gather(None, *(arrays.get(name) for name in names), static), static)[1]

                @jax.jit
                def pull(given, final=final):
                    state, transpose = jax.vjp(final, given)
                    return (jnp.zeros(()), state), transpose(state)[0]

                found.append(by_name(pull({name: given[name] for name in given if name != "q"})))
            assert_close(*found, 1e-10)

    @SLOW
    @pytest.mark.parametrize("name", ["programs share keys", "two of keys, one of values", "queries of one memory"])
    def test_simulated(self, name, monkeypatch):
        """In JAX's simulator of a TPU's memories: nothing is read before it is written or outside of a buffer."""
        strict = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
        pallas_call, simulated = pl.pallas_call, []

        def simulate(*args, interpret, **options):
            simulated.append(options["name"])
            return pallas_call(*args, interpret=strict, **options)

        monkeypatch.setattr(pl, "pallas_call", simulate)
        compare(LAYOUTS[name], jnp.float32, 1e-5)
        assert len(simulated) == 2

    def test_repeated_keys(self):
        """Reflections on one key: powers of the delta rule's system grow beyond all bounds, its inverse does not."""
        size = 128
        lower = 2 * jnp.tril(jnp.ones((size, size)), -1)
        exact = np.linalg.inv(np.eye(size) + np.asarray(lower, np.float64))
        np.testing.assert_allclose(jax.jit(unit_lower_inverse)(lower), exact, atol=1e-5)

    def test_products_round_no_float32(self):
        """With bfloat16 on the other side, three passes are as good as one in float64."""
        rng = np.random.default_rng(0)
        a, b = jnp.asarray(rng.normal(size=(8, 64)), jnp.bfloat16), jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
        wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # What sums in float32 may differ by, whatever their order; without the third pass it is several times as much.
        rounding = 2.0**-23 * (np.abs(wide[0]) @ np.abs(wide[1]))
        for found in (dot(a, b), dot(b, a, (0, 1)).T):
            assert (np.abs(found - wide[0] @ wide[1]) <= rounding).all()


def test_a_tpu_has_no_float64():
    def call(dtype):
        tokens = jax.ShapeDtypeStruct((1, 64, 2, 64), dtype)
        memory = functools.partial(chunked_memory, chunk_size=64, backend="pallas_tpu")
        return jax.eval_shape(lambda q, k, v: memory(q, k, v), tokens, tokens, tokens)

    with jax.enable_x64(True), compiling_for("tpu"):
        with pytest.raises(BackendUnavailable, match="float64"):
            call(jnp.float64)
        assert call(jnp.bfloat16)[0].dtype == jnp.bfloat16


def compare(of_case, dtype, tolerance):
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda array: jnp.asarray(array, dtype), draw(of_case))
        cotangents = cotangents_of(of_case, dtype)
        memory = functools.partial(chunked_memory, backend="pallas_tpu")
        exact = jax.tree.map(lambda array: array.astype(jnp.float64), (arguments, cotangents))
        actual = by_name(outputs_and_gradients(memory, of_case, arguments, cotangents))
        assert_close(actual, by_name(outputs_and_gradients(sum_over_pairs, of_case, *exact)), tolerance)
