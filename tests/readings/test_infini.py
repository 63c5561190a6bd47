"""The reading of Infini-attention against closed forms; nothing of lcx is imported here."""

import numpy as np
import pytest

from tests.readings.draws import (
    LENGTHS,
    D,
    H,
    K,
    dense,
    dense_heads,
    draw,
    heads_weights,
    n,
    row,
    same_document,
    turned,
)
from tests.readings.infini import infini_attention


def infini(x, weights, positions, segment_length=3, update="linear", **more):
    heads = dict(num_heads=weights["query"].shape[1], num_kv_heads=weights["key"].shape[1])
    options = dict(segment_length=segment_length, update=update, rope_base=100.0, positions=positions) | more
    return infini_attention(x, weights, **heads, **options)


@pytest.mark.parametrize("update", ["linear", "segment_delta"])
def test_one_pair_stored_in_every_segment(update):
    """Linear reads back v however often it was stored; delta reads v once and v/2 ever after."""
    weights = dict(heads_weights(), gate=np.full(H, np.inf))
    x = np.tile(draw(2, D), (7, 1))
    y, memory, normalizer = infini(x, weights, range(7), segment_length=1, update=update, eps=1e-12)
    _, k, v = dense_heads(x[:1], weights)
    read = np.einsum("hv,hvd->d", np.repeat(v[0], H // n, axis=0), weights["output"])
    share = [0, 1, 1, 1, 1, 1, 1] if update == "linear" else [0, 1, 0.5, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(y, np.outer(share, read), atol=1e-10)
    assert not y[0].any()  # nothing is read from an empty memory, exactly
    f = np.where(k[0] > 0, k[0] + 1, np.exp(k[0]))
    stored = 7 if update == "linear" else 3.5  # 1, 1, 1.5, 2, ...: half the count
    np.testing.assert_allclose(memory, stored * f[:, :, None] * v[0][:, None, :], atol=1e-10)
    np.testing.assert_allclose(normalizer, 7 * f)


@pytest.mark.parametrize("gate", [-np.inf, 0.7])
def test_the_local_part_is_block_local_attention(gate):
    """Of documents inside their first segment the memory's share is 0 exactly; with the gate at -inf always."""
    positions, _ = row(LENGTHS)
    length = 3 if gate == -np.inf else 10
    x, weights = draw(3, len(positions), D), dict(heads_weights(), gate=np.full(H, gate))
    y, *_ = infini(x, weights, positions, length)
    q, k, v = dense_heads(x, weights)
    block = positions // length
    mixed = dense(turned(q, positions), turned(k, positions), v, same_document(positions) & (block[:, None] == block))
    expected = np.einsum("thv,hvd->td", mixed, weights["output"]) / (1 + np.exp(gate))
    np.testing.assert_allclose(y, expected, atol=1e-12)


def test_the_linear_memory_is_linear_attention_over_earlier_segments():
    positions, _ = row(LENGTHS)
    x, weights = draw(4, len(positions), D), dict(heads_weights(), gate=np.full(H, np.inf))
    y, memory, normalizer = infini(x, weights, positions, eps=1e-3)
    q, k, v = dense_heads(x, weights)
    f_q, f_k = (np.where(each > 0, each + 1, np.exp(each)) for each in (q, k))
    f, values = np.repeat(f_k, H // n, axis=1), np.repeat(v, H // n, axis=1)
    segment = positions // 3
    masses = np.einsum("thk,shk->hts", f_q, f) * (same_document(positions) & (segment[:, None] > segment))
    mixed = np.einsum("hts,shv->thv", masses / (masses.sum(-1, keepdims=True) + 1e-3), values)
    np.testing.assert_allclose(y, np.einsum("thv,hvd->td", mixed, weights["output"]), atol=1e-12)
    whole = slice(-10, -1)  # of the last document of ten tokens three segments are whole
    np.testing.assert_allclose(memory, np.einsum("tnk,tnv->nkv", f_k[whole], v[whole]))
    np.testing.assert_allclose(normalizer, f_k[whole].sum(0))


def test_the_delta_of_a_whole_segment_by_matrices():
    """V - f(K) M / (f(K) z) with the memory before the segment, for all its tokens at once."""
    x, weights = draw(5, 12, D), dict(heads_weights(), gate=draw(6, H))
    _, memory, normalizer = infini(x, weights, range(12), 4, "segment_delta")
    _, k, v = dense_heads(x, weights)
    for group in range(n):
        M, z = np.zeros((K, K)), np.zeros(K)
        for segment in range(3):
            f, V = (each[4 * segment : 4 * segment + 4, group] for each in (np.where(k > 0, k + 1, np.exp(k)), v))
            M, z = M + f.T @ (V - (f @ M) / (f @ z + 1e-6)[:, None]), z + f.sum(0)
        np.testing.assert_allclose(memory[group], M, atol=1e-12)
        np.testing.assert_allclose(normalizer[group], z, atol=1e-12)


@pytest.mark.parametrize("update", ["linear", "segment_delta"])
def test_infini_packed_equals_alone(update):
    positions, documents = row(LENGTHS)
    x, weights = draw(7, len(positions), D), dict(heads_weights(), gate=draw(8, H))
    y, memory, normalizer = infini(x, weights, positions, update=update)
    for document in documents:
        alone, *last = infini(x[document], weights, positions[document], update=update)
        np.testing.assert_array_equal(y[document], alone)
    np.testing.assert_array_equal(memory, last[0])
    np.testing.assert_array_equal(normalizer, last[1])
