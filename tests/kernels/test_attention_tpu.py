"""`pallas_tpu` attention, in interpret mode here and compiled on a TPU; tests/aot has it compiled without one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.attention import NO_KEY_LOG_SUM_EXP, attention, pallas_tpu
from lcx_kernels.attention.arguments import Static
from lcx_kernels.backends import compiling_for, interpreted
from tests.kernels import test_attention as base
from tests.kernels.test_attention_triton import LARGE, compare_large


@pytest.fixture
def interpreting():
    with compiling_for("tpu"), interpreted():
        yield


@pytest.mark.parametrize("case", ["documents in a window", "halo"])
def test_large(case, interpreting):
    """Gradients of both results and of sinks, grouped heads, padded lengths, several blocks."""
    compare_large(case, "pallas_tpu", jnp.float32, (24, 40), 1e-5)


def test_gradients_of_parts(interpreting):
    """Keys that no query sees by causality, but for documents, as in a ring."""
    rng = np.random.default_rng(8)
    segments = base.documents(rng, 2, 130), base.documents(rng, 2, 150)
    segments[0][:, 4] = 9
    options = {"causal": False, "segment_ids": segments, "softcap": 3.0}
    base.compare_parts((2, 130, 150, 4, 2, 8, 6), 70, options, "pallas_tpu", jnp.dtype("float32"), 1e-5)


def blind_rows():
    """Queries 5 and 77 see no key: (who, results and gradients)."""
    q, k, v, sinks, d_out, d_log_sum_exp = base.draw(4, 1, 130, 130, 2, 1, 8, 8, np.float32)
    blind = np.isin(np.arange(130), (5, 77))
    segments = jnp.asarray(np.where(blind, 7, 3)[None], jnp.int32), jnp.full((1, 130), 3, jnp.int32)

    def run(q, k, v):
        return attention(q, k, v, sinks=sinks, segment_ids=segments, backend="pallas_tpu")

    return blind, base.results_and_gradients(run, (q, k, v), (d_out, d_log_sum_exp))


def test_a_query_without_keys_is_inert(interpreting):
    blind, (out, log_sum_exp, dq, dk, dv) = blind_rows()
    assert np.all(np.asarray(out)[:, blind] == 0) and np.all(np.asarray(dq)[:, blind] == 0)
    assert np.all(np.asarray(log_sum_exp)[:, blind] == np.float32(NO_KEY_LOG_SUM_EXP))
    assert all(np.isfinite(x).all() and np.any(np.asarray(x) != 0) for x in (out, dq, dk, dv))


def test_walks_meet_just_the_blocks_that_see_each_other():
    shapes = itertools.product((256, 640), (640, 1024), (None, 1, 100, 130, 700), (0, 100, 128, 384), (True, False))
    for time, keys, window, offset, causal in shapes:
        if offset > keys - time:
            continue
        plan = pallas_tpu.Plan(Static(causal, window, offset, 1.0, None, None), time, keys, 128, 128, False)
        query, key = np.arange(time)[:, None] + offset, np.arange(keys)[None]
        sees = (key <= query) if causal else np.ones((time, keys), bool)
        sees &= key > query - (window or 10**6)
        expected = sees.reshape(time // 128, 128, keys // 128, 128).any((1, 3))
        for by_keys in (False, True):
            blocks, met = pallas_tpu._meetings(plan, by_keys)
            found = np.zeros((blocks.shape[0], (time if by_keys else keys) // 128), int)
            np.add.at(found, (np.nonzero(met)[0], blocks[met]), 1)
            assert np.array_equal(found.T if by_keys else found, expected), (time, keys, window, offset, causal)


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in LARGE if case != "positions"])
def test_on_a_tpu(case, dtype):
    if jax.default_backend() != "tpu":
        pytest.skip("needs a TPU")
    compare_large(case, "pallas_tpu", jnp.dtype(dtype), (64, 128), {"float32": 1e-5, "bfloat16": 1e-2}[dtype])


@pytest.mark.tpu
def test_a_query_without_keys_on_a_tpu():
    if jax.default_backend() != "tpu":
        pytest.skip("needs a TPU")
    test_a_query_without_keys_is_inert(None)
