"""The pieces that the readings share: norm, SwiGLU, rotary positions, softmax attention, the residual model.

The modules of this folder read the papers once more, independently of lcx: NumPy in float64, one token after the other,
one row at a time, no batch. Clear rather than fast; the tests of lcx compare with them.

A row holds documents one after the other. `positions` [T] counts each document's tokens from 0: a 0 starts a document.
Shapes: T time, D model width, H query heads, n key/value heads, K and V head widths, F inner width of the MLP.
"""

import numpy as np


def float64(tree):
    """Nested dicts and lists of arrays of any kind, as NumPy float64."""
    if isinstance(tree, dict):
        return {name: float64(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [float64(value) for value in tree]
    return np.asarray(tree, np.float64)


def document_positions(positions, length):
    """`positions` as Python ints; ValueError unless each is 0 or one more than the last, and the first is 0."""
    positions = [int(position) for position in np.asarray(positions)]
    if len(positions) != length:
        raise ValueError(f"{length} tokens but {len(positions)} positions")
    last = -1
    for position in positions:
        if position not in ((0,) if last < 0 else (0, last + 1)):
            raise ValueError(f"position {position} follows {last}")
        last = position
    return positions


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, eq. 4)."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def swiglu(x, weights):
    """down(silu(gate x) * (up x)) (Shazeer 2020, eq. 6). gate, up [D, F], down [F, D]."""
    return (silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


def rotate(x, position, base):
    """RoPE of one token's heads x [..., K] at `position`, half-split: component i turns with component i + K/2 by the
    angle position * base^(-2i/K). `base` None leaves x as it is (Su et al. 2021, eq. 34; the pairs as in Llama of HF).
    """
    if base is None:
        return x
    half = x.shape[-1] // 2
    rotated = np.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / x.shape[-1])
        first, second = x[..., i], x[..., i + half]
        rotated[..., i] = first * np.cos(angle) - second * np.sin(angle)
        rotated[..., i + half] = second * np.cos(angle) + first * np.sin(angle)
    return rotated


def attend(query, keys, values, sink_logit=None):
    """One query of one head: softmax of query . key / sqrt(K) over the given keys, the average of the values.

    query [K], keys [S, K], values [S, V] -> [V]. `sink_logit`, a scalar that is not scaled, joins the denominator only.
    """
    scores = np.array([key @ query for key in keys]) / np.sqrt(len(query))
    largest = scores.max() if sink_logit is None else max(scores.max(), sink_logit)
    masses = np.exp(scores - largest)
    total = masses.sum() + (0 if sink_logit is None else np.exp(sink_logit - largest))
    return sum(mass * value for mass, value in zip(masses, values, strict=True)) / total


def project(x, weights, num_heads, num_kv_heads):
    """Queries [T, H, K], keys [T, n, K] and values [T, n, V] of x [T, D], before any rotation."""
    query, key, value = (np.einsum("td,dhk->thk", x, weights[name]) for name in ("query", "key", "value"))
    if (query.shape[1], key.shape[1], value.shape[1]) != (num_heads, num_kv_heads, num_kv_heads):
        raise ValueError(f"{num_heads} and {num_kv_heads} heads do not fit {query.shape} and {key.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} key/value heads do not divide {num_heads} heads")
    return query, key, value


def window_attention(x, weights, *, num_heads, num_kv_heads, window, positions, rope_base):
    """Causal attention of x [T, D] -> [T, D] inside each document; token i sees i - window + 1 .. i, all if None.

    weights: query [D, H, K], key [D, n, K], value [D, n, V], output [H, V, D]. Query head h reads key/value head
    h // (H / n) (Ainslie et al. 2023).
    """
    queries, keys, values = project(x, weights, num_heads, num_kv_heads)
    positions = document_positions(positions, len(x))
    y = np.zeros_like(x)
    for t, position in enumerate(positions):
        start = t - position  # the document's first token
        if window is not None:
            start = max(start, t - window + 1)
        query = rotate(queries[t], position, rope_base)
        seen = [rotate(keys[s], positions[s], rope_base) for s in range(start, t + 1)]
        for head in range(num_heads):
            group = head // (num_heads // num_kv_heads)
            mixed = attend(query[head], [key[group] for key in seen], values[start : t + 1, group])
            y[t] += mixed @ weights["output"][head]
    return y


def residual_logits(tokens, weights, layers, eps):
    """Logits [T, vocabulary] of tokens [T]: embedding, x += layer(rms_norm(x)) for each layer, final norm, tied head.

    weights: embedding [vocabulary, D], layers: a list of {"norm": [D], "weights": what layers[i](x, weights) takes},
    final_norm [D]; `layers` holds one function for each entry of weights["layers"].
    """
    x = np.stack([weights["embedding"][int(token)] for token in np.asarray(tokens)])
    for layer, own in zip(layers, weights["layers"], strict=True):
        x = x + layer(rms_norm(x, own["norm"], eps), own["weights"])
    return rms_norm(x, weights["final_norm"], eps) @ weights["embedding"].T
