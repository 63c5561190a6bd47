"""The reading of Mamba-2 against its dual form, one matrix of pairs; nothing of lcx is imported here."""

import numpy as np
import pytest

from tests.readings.draws import LENGTHS, D, draw, row, same_document
from tests.readings.mamba2 import mamba2
from tests.readings.samba import causal_conv

H, P, G, N, WIDTH = 4, 3, 2, 5, 4
I = H * P  # noqa: E741
LIMITS = [(0.0, np.inf), (0.4, 0.9)]


def weights_of(groups=G):
    channels = I + 2 * groups * N
    shapes = dict(
        in_proj=(D, I + channels + H), conv_weight=(channels, WIDTH), conv_bias=(channels,), dt_bias=(H,), A_log=(H,),
        skip=(H,), norm=(I,), out_proj=(I, D),
    )  # fmt: skip
    return {name: draw([groups, i], *shape) for i, (name, shape) in enumerate(shapes.items())}


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_dual_form(groups, limit):
    """y = (L * (C B^T)) (dt x) + skip x of each head, L[t, s] = exp(A sum of dt over s+1..t) within a document."""
    positions, documents = row(LENGTHS)
    x, weights = draw(1, len(positions), D), weights_of(groups)
    z, xBC, dt = np.split(x @ weights["in_proj"], [I, 2 * I + 2 * groups * N], axis=1)
    xBC = silu(causal_conv(xBC, weights["conv_weight"], weights["conv_bias"], positions))
    u, B, C = (each.reshape(len(x), -1, last) for each, last in zip(
        np.split(xBC, [I, I + groups * N], axis=1), (P, N, N), strict=True))  # fmt: skip
    B, C = (np.repeat(each, H // groups, axis=1) for each in (B, C))
    dt = np.clip(np.log(1 + np.exp(dt + weights["dt_bias"])), *limit)
    log_decay = -np.exp(weights["A_log"]) * dt
    total = np.cumsum(log_decay, axis=0)
    L = np.exp(total[:, None] - total) * same_document(positions)[..., None]  # [T, S, H]
    out = np.einsum("tsh,thn,shn,shp->thp", L, C, B, dt[..., None] * u) + weights["skip"][:, None] * u
    gated = (out.reshape(len(x), I) * silu(z)).reshape(len(x), groups, -1)
    normed = gated / np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-5)
    y, state = mamba2(x, weights, num_groups=groups, positions=positions, dt_limit=limit)
    expected = (normed.reshape(len(x), I) * weights["norm"]) @ weights["out_proj"]
    np.testing.assert_allclose(y, expected, atol=1e-12)
    last = documents[-1]
    left = np.einsum("sh,shp,shn->hpn", L[-1, last], (dt[..., None] * u)[last], B[last])
    np.testing.assert_allclose(state, left, atol=1e-12)


def test_one_token_of_a_document_has_no_decay():
    x, weights = draw(2, 1, D), weights_of()
    y, _ = mamba2(x, weights, num_groups=G, positions=[0])
    other = dict(weights, A_log=weights["A_log"] + 1)
    np.testing.assert_array_equal(mamba2(x, other, num_groups=G, positions=[0])[0], y)


def test_mamba2_packed_equals_alone():
    positions, documents = row(LENGTHS)
    x, weights = draw(3, len(positions), D), weights_of()
    y, state = mamba2(x, weights, num_groups=G, positions=positions)
    for document in documents:
        alone, left = mamba2(x[document], weights, num_groups=G, positions=positions[document])
        np.testing.assert_allclose(y[document], alone, atol=1e-12)
    np.testing.assert_allclose(state, left, atol=1e-12)
