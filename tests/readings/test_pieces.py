"""The readings' pieces against masked softmax, complex rotation and numbers worked by hand."""

import numpy as np
import pytest

from tests.readings import pieces
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


def test_norm_mlp_and_rotation():
    np.testing.assert_allclose(pieces.rms_norm(np.array([3.0, 4.0]), np.array([1.0, 10]), 12.5), [0.6, 8.0])
    mlp = dict(gate=np.array([[2.0]]), up=np.array([[3.0]]), down=np.array([[5.0]]))
    np.testing.assert_allclose(pieces.swiglu(np.array([1.0]), mlp), [2 / (1 + np.exp(-2)) * 3 * 5])
    x = draw(0, 5, H, K)
    rotated = np.stack([pieces.rotate(x[t], t, 100.0) for t in range(5)])
    np.testing.assert_allclose(rotated, turned(x, range(5)), atol=1e-14)


@pytest.mark.parametrize("window", [1, 3, 50, None])
def test_window_attention_is_a_masked_softmax(window):
    positions, _ = row(LENGTHS)
    x, weights = draw(1, len(positions), D), heads_weights()
    y = pieces.window_attention(
        x, weights, num_heads=H, num_kv_heads=n, window=window, positions=positions, rope_base=100.0
    )
    q, k, v = dense_heads(x, weights)
    index = np.arange(len(x))
    visible = same_document(positions) & (index[:, None] - index < (window or len(x)))
    mixed = dense(turned(q, positions), turned(k, positions), v, visible)
    np.testing.assert_allclose(y, np.einsum("thv,hvd->td", mixed, weights["output"]), atol=1e-12)


@pytest.mark.parametrize("positions", [[1, 2], [0, 2], [0, 1, 1], [0, 1, 2]])
def test_positions_that_are_no_documents(positions):
    with pytest.raises(ValueError):
        pieces.document_positions(positions, 2)
