"""The readings of Mamba and of whole models against closed forms; nothing of lcx is imported here."""

import numpy as np
import pytest

from tests.readings.draws import LENGTHS, VOCABULARY, D, H, draw, heads_weights, mamba_weights, model_weights, n, row
from tests.readings.infini import infini_lm_logits
from tests.readings.samba import causal_conv, mamba, samba_logits


def test_the_convolution_is_numpys():
    positions, documents = row(LENGTHS)
    x, weight, bias = draw(1, len(positions), 3), draw(2, 3, 4), draw(3, 3)
    out = causal_conv(x, weight, bias, positions)
    for document in documents:
        for c in range(3):
            expected = bias[c] + np.convolve(x[document, c], weight[c, ::-1])[: len(x[document])]
            np.testing.assert_allclose(out[document, c], expected, atol=1e-14)


def test_the_recurrence_with_constant_dt_B_C():
    """y[t] = dt sum_s (C . exp((t - s) dt A) B) u[s] + skip u[t]; a constant input is a geometric series."""
    T, N, rank = 9, 3, 2
    weights = mamba_weights()
    inner = len(weights["skip"])
    weights["conv_weight"][:, :-1] = 0  # the current token only
    weights["conv_weight"][0], weights["conv_bias"][0] = 0, 1.3  # channel 0 is constant, and B and C are its
    weights["x_proj"][1:] = 0
    weights["x_proj"][0, :rank] = 0  # dt is softplus(dt_bias)
    x = draw(10, T, D)
    u, z = np.split(x @ weights["in_proj"], 2, axis=1)
    u = u * weights["conv_weight"][:, -1] + weights["conv_bias"]
    u = u / (1 + np.exp(-u))
    B, C = weights["x_proj"][0, rank:].reshape(2, N) * u[0, 0]
    dt = np.log(1 + np.exp(weights["dt_bias"]))
    A = -np.exp(weights["A_log"])
    out = weights["skip"] * u
    for c in range(inner):
        kernel = dt[c] * np.exp(np.arange(T)[:, None] * dt[c] * A[c]) @ (B * C)
        out[:, c] += np.convolve(kernel, u[:, c])[:T]
    ratio = np.exp(dt[0] * A[0])
    series = dt[0] * ((1 - ratio ** (1 + np.arange(T)[:, None])) / (1 - ratio)) @ (B * C) * u[0, 0]
    np.testing.assert_allclose(out[:, 0], series + weights["skip"][0] * u[:, 0])
    expected = (out * z / (1 + np.exp(-z))) @ weights["out_proj"]
    np.testing.assert_allclose(mamba(x, weights, positions=range(T)), expected, atol=1e-12)


def test_the_recurrence_as_one_sum():
    """y[t] = sum_s C[t] . (exp(A sum of dt over s+1..t) B[s]) dt[s] u[s] + skip u[t], where everything varies."""
    T, N, rank = 7, 3, 2
    weights, x = mamba_weights(), draw(12, T, D)
    u, z = np.split(x @ weights["in_proj"], 2, axis=1)
    u = causal_conv(u, weights["conv_weight"], weights["conv_bias"], range(T))
    u = u / (1 + np.exp(-u))
    dt, B, C = np.split(u @ weights["x_proj"], [rank, rank + N], axis=1)
    dt = np.log(1 + np.exp(dt @ weights["dt_proj"] + weights["dt_bias"]))
    total = np.cumsum(dt, 0)
    decay = np.exp((total[:, None] - total)[..., None] * -np.exp(weights["A_log"]))  # [T, S, I, N]
    out = np.einsum("ts,tn,tsin,sn,si->ti", np.tri(T), C, decay, B, dt * u) + weights["skip"] * u
    expected = (out * z / (1 + np.exp(-z))) @ weights["out_proj"]
    np.testing.assert_allclose(mamba(x, weights, positions=range(T)), expected, atol=1e-12)


def test_the_norms_of_jamba_forget_the_scale():
    """With dt, B and C normed, the three columns of x_proj may be scaled by anything, and their weights by its like."""
    weights, x = mamba_weights(), draw(11, 6, D)
    normed = dict(weights, dt_norm=1 + draw(1, 2), B_norm=1 + draw(2, 3), C_norm=1 + draw(3, 3))
    y = mamba(x, normed, positions=range(6), norm_eps=0)
    scaled = dict(normed, x_proj=weights["x_proj"] * np.repeat([3, 5, 7], [2, 3, 3]))
    np.testing.assert_allclose(mamba(x, scaled, positions=range(6), norm_eps=0), y, atol=1e-12)
    halves = dict(C_norm=normed["C_norm"] / 2, dt_proj=normed["dt_proj"] / 2)
    doubled = dict(normed, B_norm=2 * normed["B_norm"], dt_norm=2 * normed["dt_norm"], **halves)
    np.testing.assert_allclose(mamba(x, doubled, positions=range(6), norm_eps=0), y, atol=1e-12)
    assert np.abs(mamba(x, weights, positions=range(6)) - y).max() > 1e-2


def logits(kind, tokens, positions, **more):
    heads = dict(num_heads=H, num_kv_heads=n, positions=positions, rope_base=100.0)
    if kind == "samba":
        weights = model_weights([mamba_weights(0), heads_weights(1), mamba_weights(2), heads_weights(3)])
        return samba_logits(tokens, weights, **heads, **dict(window=3) | more)
    weights = model_weights([dict(heads_weights(i), gate=draw(i, H)) for i in range(2)])
    return infini_lm_logits(tokens, weights, **heads, **dict(segment_length=3, update="segment_delta") | more)


@pytest.mark.parametrize("kind", ["samba", "infini"])
def test_models_packed_equal_alone_and_causal(kind):
    positions, documents = row(LENGTHS)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=len(positions))
    packed = logits(kind, tokens, positions)
    for document in documents:
        alone = logits(kind, tokens[document], positions[document])
        np.testing.assert_allclose(packed[document], alone, atol=1e-12)  # BLAS may sum rows of another count otherwise
    other = tokens.copy()
    other[12] = (other[12] + 1) % VOCABULARY
    changed = np.abs(logits(kind, other, positions) - packed).max(-1) > 1e-9
    np.testing.assert_array_equal(changed, np.arange(len(tokens)) >= 12)  # the last document begins at 8


def test_a_window_longer_than_the_document_is_full_attention():
    tokens = np.arange(9)
    full = logits("samba", tokens, range(9), window=None)
    np.testing.assert_array_equal(logits("samba", tokens, range(9), window=9), full)
    assert np.abs(logits("samba", tokens, range(9), window=8) - full)[-1].max() > 1e-6


def test_layers_that_add_nothing_leave_the_embedding():
    mixers = [mamba_weights(0), heads_weights(1)]
    mixers[0]["out_proj"][:], mixers[1]["output"][:] = 0, 0
    weights = model_weights(mixers)
    for layer in weights["layers"][1::2]:
        layer["weights"]["down"][:] = 0
    tokens = [3, 1, 4]
    x = weights["embedding"][tokens]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights["final_norm"] @ weights["embedding"].T
    heads = dict(num_heads=H, num_kv_heads=n, window=2)
    np.testing.assert_allclose(samba_logits(tokens, weights, positions=range(3), **heads), expected, atol=1e-12)
