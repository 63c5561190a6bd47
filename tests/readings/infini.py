"""Infini-attention (Munkhdalai et al., arXiv 2404.07143 v2, section 2), token by token.

Segments are counted inside each document: segment = position // segment_length. What the paper leaves open is read so:
the score scale is 1/sqrt(K) with the head's width; `eps` is added to every denominator f(.) . normalizer; what is read
from an empty memory is exactly 0; one memory serves each key/value head.
"""

from functools import partial

import numpy as np

from tests.readings.pieces import attend, document_positions, float64, project, residual_logits, rotate, sigmoid, swiglu


def feature(x):
    """f(x) = ELU(x) + 1, which is above 0."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


class Memory:
    """One key/value head's memory M [K, V] and normalizer z [K], which only whole segments enter."""

    def __init__(self, key_width, value_width, eps):
        self.memory, self.normalizer = np.zeros((key_width, value_width)), np.zeros(key_width)
        self.eps, self.empty = eps, True

    def read(self, x):
        """f(x) M / (f(x) . z + eps) for one query or key x [K] without rotation ("memory retrieval")."""
        if self.empty:
            return np.zeros(self.memory.shape[1])
        return feature(x) @ self.memory / (feature(x) @ self.normalizer + self.eps)

    def store(self, keys, values, update):
        """One whole segment, keys [S, K] and values [S, V] ("memory update").

        "segment_delta" takes off each value what the memory before this segment already returns for its key: the
        tokens of one segment do not see each other.
        """
        news = values
        if update == "segment_delta":
            news = [value - self.read(key) for key, value in zip(keys, values, strict=True)]
        for key, new in zip(keys, news, strict=True):
            self.memory = self.memory + np.outer(feature(key), new)
            self.normalizer = self.normalizer + feature(key)
        self.empty = False


def infini_attention(x, weights, *, num_heads, num_kv_heads, segment_length, update, rope_base, positions, eps=1e-6):
    """One row x [T, D] of documents -> (y [T, D], memory [n, K, V], normalizer [n, K]).

    weights: query [D, H, K], key [D, n, K], value [D, n, V], output [H, V, D], gate [H] (beta, before the sigmoid).
    `positions` [T]: 0 starts a document, whose memory, normalizer and local context are empty. `update`: "linear" or
    "segment_delta". A segment is stored right after its last token, the one at segment_length - 1 of it; the memory
    returned is the last document's and holds its whole segments only.
    """
    if update not in ("linear", "segment_delta"):
        raise ValueError(update)
    x, weights = float64(x), float64(weights)
    queries, keys, values = project(x, weights, num_heads, num_kv_heads)
    gate = sigmoid(weights["gate"])
    y = np.zeros_like(x)
    memories, opened = [], 0
    for t, position in enumerate(document_positions(positions, len(x))):
        if position == 0:
            memories = [Memory(keys.shape[2], values.shape[2], eps) for _ in range(num_kv_heads)]
        if position % segment_length == 0:
            opened = t  # the row's index of the open segment's first token
        query = rotate(queries[t], position, rope_base)
        seen = [rotate(keys[s], position - (t - s), rope_base) for s in range(opened, t + 1)]
        for head in range(num_heads):
            group = head // (num_heads // num_kv_heads)
            local = attend(query[head], [key[group] for key in seen], values[opened : t + 1, group])
            recalled = memories[group].read(queries[t, head])
            mixed = gate[head] * recalled + (1 - gate[head]) * local  # "long-term context injection"
            y[t] += mixed @ weights["output"][head]
        if position % segment_length == segment_length - 1:
            for group, memory in enumerate(memories):
                memory.store(keys[opened : t + 1, group], values[opened : t + 1, group], update)
    return y, np.stack([each.memory for each in memories]), np.stack([each.normalizer for each in memories])


def infini_lm_logits(tokens, weights, *, positions, norm_eps=1e-5, **options):
    """Logits [T, vocabulary] of one row of tokens [T]: (Infini-attention, MLP) repeated, tied head.

    weights: see residual_logits; the even layers' weights are infini_attention's, the odd ones' swiglu's. `options`
    are infini_attention's other keyword arguments (its `eps` is that of the memory's denominator).
    """
    weights = float64(weights)
    attention = partial(infini_attention, positions=positions, **options)
    kinds = [lambda x, own: attention(x, own)[0], swiglu]
    return residual_logits(tokens, weights, [kinds[i % 2] for i in range(len(weights["layers"]))], norm_eps)
