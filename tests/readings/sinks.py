"""Attention with sinks: StreamingLLM's rolling cache (Xiao et al., arXiv 2309.17453) run literally, and sink logits."""

import numpy as np

from tests.readings.pieces import attend, document_positions, float64, rotate


class RollingCache:
    """The first `sink_tokens` tokens of a document and its last `window` ones, keys as they are before rotation."""

    def __init__(self, sink_tokens, window):
        self.sink_tokens, self.window = sink_tokens, window
        self.keys, self.values = [], []

    def append(self, key, value):
        """One token, key [n, K] and value [n, V]. A full cache drops the token right after the sinks."""
        self.keys.append(key)
        self.values.append(value)
        if self.window is not None and len(self.keys) > self.sink_tokens + self.window:
            del self.keys[self.sink_tokens], self.values[self.sink_tokens]

    def rotated_keys(self, rope_base):
        """Positions are indices in the cache, not in the text."""
        return [rotate(key, index, rope_base) for index, key in enumerate(self.keys)]


def sink_attention(q, k, v, *, window, sink_tokens, sink_logit, positions, rope_base):
    """One row q [T, H, K], k [T, n, K], v [T, n, V], none rotated -> [T, H, V], before the output projection.

    The token itself is in the cache before it is answered and is one of the `window` (None: nothing is evicted); its
    query's position is its index in the cache. `sink_logit` [H] or None: exp(sink_logit[h]) joins head h's softmax
    denominator, not scaled by 1/sqrt(K) (gpt-oss); zeros give softmax-off-by-one. `positions`: 0 starts a document,
    with an empty cache. `rope_base` None: no rotation.
    """
    q, k, v = float64(q), float64(k), float64(v)
    heads, groups = q.shape[1], k.shape[1]
    sink_logit = [None] * heads if sink_logit is None else float64(sink_logit)
    out = np.zeros((len(q), heads, v.shape[2]))
    cache = None
    for t, position in enumerate(document_positions(positions, len(q))):
        if position == 0:
            cache = RollingCache(sink_tokens, window)
        cache.append(k[t], v[t])
        keys = cache.rotated_keys(rope_base)
        query = rotate(q[t], len(keys) - 1, rope_base)
        for head in range(heads):
            group = head // (heads // groups)
            seen = [key[group] for key in keys], [value[group] for value in cache.values]
            out[t, head] = attend(query[head], *seen, sink_logit[head])
    return out
