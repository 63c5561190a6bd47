"""Mamba-2 (Dao and Gu, arXiv 2405.21060, section 7 and figure 6; details as in their mamba2.py), token by token.

I is the inner width, H the heads, P = I/H their channels, G the groups of heads, N the state. Head h is of the group
h // (H/G).
"""

from functools import partial

import numpy as np

from tests.readings.pieces import document_positions, float64, residual_logits, rms_norm, silu
from tests.readings.samba import causal_conv


def mamba2(x, weights, *, num_groups, positions, dt_limit=(0.0, np.inf), norm_eps=1e-5):
    """One row x [T, D] of documents -> (y [T, D], what each head's state is after the row, [H, P, N]).

    weights: in_proj [D, 2 I + 2 G N + H] (z, x, B, C, dt), conv_weight [I + 2 G N, width] and conv_bias [I + 2 G N]
    (of x, B, C), dt_bias [H], A_log [H], skip [H], norm [I], out_proj [I, D].
    """
    x, weights = float64(x), float64(weights)
    positions = document_positions(positions, len(x))
    H, I = len(weights["A_log"]), len(weights["norm"])  # noqa: E741
    P, G = I // H, num_groups
    N = (len(weights["conv_bias"]) - I) // (2 * G)
    projected = x @ weights["in_proj"]
    z, convolved, dt = np.split(projected, [I, 2 * I + 2 * G * N], axis=1)
    convolved = silu(causal_conv(convolved, weights["conv_weight"], weights["conv_bias"], positions))
    y = np.zeros_like(x)
    for t, position in enumerate(positions):
        if position == 0:
            S = np.zeros((H, P, N))
        u = convolved[t, :I].reshape(H, P)
        B, C = convolved[t, I:].reshape(2, G, N)
        step = np.clip(np.logaddexp(0, dt[t] + weights["dt_bias"]), *dt_limit)  # softplus
        out = np.zeros((H, P))
        for h in range(H):
            group = h // (H // G)
            A = -np.exp(weights["A_log"][h])
            S[h] = np.exp(step[h] * A) * S[h] + step[h] * np.outer(u[h], B[group])
            out[h] = S[h] @ C[group] + weights["skip"][h] * u[h]
        gated = (out.reshape(I) * silu(z[t])).reshape(G, I // G)  # the norm's mean is over a group's channels
        y[t] = rms_norm(gated, weights["norm"].reshape(G, I // G), norm_eps).reshape(I) @ weights["out_proj"]
    return y, S


def mamba2_logits(tokens, weights, *, positions, norm_eps=1e-5, **options):
    """Logits [T, vocabulary] of one row of tokens [T]: Mamba-2 layers alone, tied head.

    weights: see residual_logits, the layers' are mamba2's; `options` are its other keyword arguments.
    """
    weights = float64(weights)
    mixer = partial(mamba2, positions=positions, norm_eps=norm_eps, **options)
    layers = [lambda x, own: mixer(x, own)[0]] * len(weights["layers"])
    return residual_logits(tokens, weights, layers, norm_eps)
