"""Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2; details as in their mamba_simple.py) and SAMBA (Ren et al.,
arXiv 2406.07522), token by token.

I is Mamba's inner width, N its state, R the rank of dt.
"""

from functools import partial

import numpy as np

from tests.readings.pieces import (
    document_positions,
    float64,
    residual_logits,
    rms_norm,
    silu,
    swiglu,
    window_attention,
)

SAMBA = ("mamba", "mlp", "attention", "mlp")


def causal_conv(x, weight, bias, positions):
    """out[t] = bias + sum_j weight[:, j] * x[t - (width - 1) + j], zeros left of the document's first token.

    x [T, I], weight [I, width] whose last column multiplies the current token, bias [I].
    """
    width = weight.shape[1]
    out = np.zeros_like(x)
    for t, position in enumerate(positions):
        out[t] = bias
        for back in range(min(width, position + 1)):
            out[t] += weight[:, width - 1 - back] * x[t - back]
    return out


def mamba(x, weights, *, positions, norm_eps=1e-5):
    """One row x [T, D] -> [T, D]. Zero-order hold for A, Euler for B; the skip reads the convolution's output.

    weights: in_proj [D, 2 I] (x first, then z), conv_weight [I, width], conv_bias [I], x_proj [I, R + 2 N] (dt, B, C),
    dt_proj [R, I], dt_bias [I], A_log [I, N], skip [I], out_proj [I, D]; with dt_norm [R], B_norm [N] and C_norm [N]
    each of the three is normed right after x_proj (Jamba).
    """
    x, weights = float64(x), float64(weights)
    positions = document_positions(positions, len(x))
    inner, N = weights["A_log"].shape
    rank = weights["dt_proj"].shape[0]
    projected = x @ weights["in_proj"]
    u, z = projected[:, :inner], projected[:, inner:]
    u = silu(causal_conv(u, weights["conv_weight"], weights["conv_bias"], positions))
    A = -np.exp(weights["A_log"])
    y = np.zeros_like(x)
    h = np.zeros((inner, N))
    for t, position in enumerate(positions):
        if position == 0:
            h = np.zeros((inner, N))
        selected = u[t] @ weights["x_proj"]
        dt, B, C = selected[:rank], selected[rank : rank + N], selected[rank + N :]
        if "dt_norm" in weights:
            dt = rms_norm(dt, weights["dt_norm"], norm_eps)
            B = rms_norm(B, weights["B_norm"], norm_eps)
            C = rms_norm(C, weights["C_norm"], norm_eps)
        dt = np.logaddexp(0, dt @ weights["dt_proj"] + weights["dt_bias"])  # softplus, one step for each channel
        for channel in range(inner):
            keep = np.exp(dt[channel] * A[channel])
            h[channel] = keep * h[channel] + dt[channel] * B * u[t, channel]
        out = h @ C + weights["skip"] * u[t]
        y[t] = (out * silu(z[t])) @ weights["out_proj"]
    return y


def samba_logits(
    tokens, weights, *, positions, num_heads, num_kv_heads, window, rope_base=10000.0, norm_eps=1e-5, pattern=SAMBA
):
    """Logits [T, vocabulary] of one row of tokens [T]: (Mamba, MLP, SWA, MLP) repeated, tied head.

    weights: see residual_logits; layer i is a pattern[i % len(pattern)], its weights are mamba's, swiglu's ("mlp") or
    window_attention's ("attention"). `rope_base` None: without positions (SAMBA-NoPE).
    """
    weights = float64(weights)
    heads = dict(num_heads=num_heads, num_kv_heads=num_kv_heads)
    kinds = {
        "mamba": partial(mamba, positions=positions, norm_eps=norm_eps),
        "mlp": swiglu,
        "attention": partial(window_attention, **heads, window=window, positions=positions, rope_base=rope_base),
    }
    layers = [kinds[pattern[i % len(pattern)]] for i in range(len(weights["layers"]))]
    return residual_logits(tokens, weights, layers, norm_eps)
