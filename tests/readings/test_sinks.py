"""The reading of StreamingLLM's cache against a mask of distances; nothing of lcx is imported here."""

import numpy as np
import pytest

from tests.readings.draws import LENGTHS, H, K, dense, draw, n, row, same_document, turned
from tests.readings.sinks import sink_attention


def sink(q, k, v, positions, window=3, sink_tokens=2, sink_logit=None):
    options = dict(window=window, sink_tokens=sink_tokens, sink_logit=sink_logit, rope_base=100.0)
    return sink_attention(q, k, v, positions=positions, **options)


def test_the_example_of_the_paper():
    """Sinks 0 to 3 and a window of 4: at token 9 the cache is 0 1 2 3 6 7 8 9, the positions are 0 to 7."""
    q, k, v = draw(0, 10, H, K), draw(1, 10, n, K), draw(2, 10, n, K)
    cached = [0, 1, 2, 3, 6, 7, 8, 9]
    expected = dense(turned(q[[9]], [7]), turned(k[cached], range(8)), v[cached], np.ones((1, 8)))
    np.testing.assert_allclose(sink(q, k, v, range(10), window=4, sink_tokens=4)[9:], expected, atol=1e-12)


@pytest.mark.parametrize("sink_tokens", [0, 1, 4])
@pytest.mark.parametrize("window", [1, 3, 20, None])
def test_the_rolling_cache_clamps_the_distance_of_sinks(window, sink_tokens):
    """As a mask: in the window the distance of the text, to a sink min(i, sink_tokens + window - 1) - j."""
    positions, _ = row(LENGTHS)
    T = len(positions)
    q, k, v, logit = draw(3, T, H, K), draw(4, T, n, K), draw(5, T, n, K), draw(6, H)
    w = window or T
    j = np.broadcast_to(positions, (T, T))
    distance = positions[:, None] - j
    is_sink = j < sink_tokens
    visible = same_document(positions) & (is_sink | (distance < w))
    distance = np.where(is_sink, np.minimum(positions, sink_tokens + w - 1)[:, None] - j, distance)
    out = sink(q, k, v, positions, window, sink_tokens, logit)
    for i in range(T):  # the query is not turned, a key by the distance backwards
        seen = np.flatnonzero(visible[i])
        keys = turned(k[seen], -distance[i, seen])
        expected = dense(q[[i]], keys, v[seen], np.ones((1, len(seen))), logit)
        np.testing.assert_allclose(out[[i]], expected, atol=1e-12)


def test_sink_logits():
    T = 8
    q, k, v = draw(7, T, H, K), draw(8, T, n, K), draw(9, T, n, K)
    whole = dict(window=None, sink_tokens=0)
    plain = sink(q, k, v, range(T), **whole)
    # 0 is one more key and value of zeros
    zero = np.zeros((1, n, K))
    visible = np.concatenate([same_document(range(T)), np.ones((T, 1))], 1)
    keys, values = np.concatenate([turned(k, range(T)), zero]), np.concatenate([v, zero])
    expected = dense(turned(q, range(T)), keys, values, visible)
    np.testing.assert_allclose(sink(q, k, v, range(T), **whole, sink_logit=np.zeros(H)), expected, atol=1e-12)
    # -inf is softmax, and a logit s scales it by sigmoid(lse - s)
    np.testing.assert_array_equal(sink(q, k, v, range(T), **whole, sink_logit=np.full(H, -np.inf)), plain)
    scores = np.einsum("thk,shk->ths", turned(q, range(T)), np.repeat(turned(k, range(T)), H // n, 1)) / np.sqrt(K)
    lse = np.log((np.exp(scores) * same_document(range(T))[:, None]).sum(-1))
    logit = np.array([-1.0, 0.5, 2.0, 300.0])
    expected = plain / (1 + np.exp(logit - lse))[..., None]
    np.testing.assert_allclose(sink(q, k, v, range(T), **whole, sink_logit=logit), expected, atol=1e-12)


def test_sinks_packed_equals_alone():
    positions, documents = row(LENGTHS)
    q, k, v = (draw(i, len(positions), heads, K) for i, heads in ((1, H), (2, n), (3, n)))
    packed = sink(q, k, v, positions, sink_logit=draw(4, H))
    for document in documents:
        alone = sink(q[document], k[document], v[document], positions[document], sink_logit=draw(4, H))
        np.testing.assert_array_equal(packed[document], alone)
