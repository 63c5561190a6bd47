"""Document numbers as attention compares them: the same pairs as looking back a number of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.mixers.heads import documents, tail_documents


def test_numbers_by_hand():
    lookback = jnp.asarray([[3, 4, 0, 1, 0, 0], [0, 1, 2, 3, 0, 1]], jnp.int32)
    assert documents(lookback).tolist() == [[1, 1, 2, 2, 3, 4], [1, 1, 1, 1, 2, 2]]
    assert tail_documents(lookback, 5).tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("held", [0, 3, 12])
def test_same_document_means_within_the_lookback(held):
    rng = np.random.default_rng(held)
    time = 20
    for _ in range(20):
        before = int(rng.integers(0, held + 1))  # how far the first document reaches back
        starts = rng.random(time) < 0.2
        lookback = np.zeros(time, np.int32)
        for t in range(time):
            lookback[t] = 0 if starts[t] else (before if t == 0 else lookback[t - 1] + 1)
        row = jnp.asarray(lookback)[None]
        of_query, of_tail = documents(row)[0], tail_documents(row, held)[0]
        of_key = np.concatenate([of_tail, of_query])
        distance = held + np.arange(time)[:, None] - np.arange(held + time)[None]
        same = (np.asarray(of_query)[:, None] == of_key) & (distance >= 0)
        assert np.array_equal(same, (distance >= 0) & (distance <= lookback[:, None]))
