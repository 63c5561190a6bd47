import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.data.shuffle import document_order, make_key, permute

KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), KEYS)
def test_permute_is_a_bijection(n, key):
    out = permute(np.arange(n), n, key)
    assert out.dtype == np.int64
    assert np.array_equal(np.sort(out), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**31, 2**62), KEYS, st.integers(0, 2**31 - 5000))
def test_permute_stays_inside_and_apart_for_huge_n(n, key, start):
    out = permute(np.arange(start, start + 5000), n, key)
    assert out.min() >= 0 and out.max() < n and len(set(out.tolist())) == 5000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**6), KEYS), min_size=1, max_size=20), st.data())
def test_permute_broadcasts_and_each_index_stands_alone(pairs, data):
    sizes, keys = np.array([n for n, _ in pairs]), np.array([key for _, key in pairs], np.uint64)
    index = np.array([data.draw(st.integers(0, n - 1)) for n, _ in pairs])
    alone = [int(permute(i, n, key)) for i, (n, key) in zip(index, pairs, strict=True)]
    assert permute(index, sizes, keys).tolist() == alone


def test_every_order_is_about_equally_likely():
    for n in (2, 3, 4):
        draws = 400 * len(list(itertools.permutations(range(n))))
        keys = np.array([make_key("test", n, i) for i in range(draws)], np.uint64)
        orders = Counter(map(tuple, permute(np.arange(n), n, keys[:, None]).tolist()))
        expected = draws / len(list(itertools.permutations(range(n))))
        assert len(orders) * expected == draws
        assert all(abs(count - expected) < 6 * expected**0.5 for count in orders.values()), orders


def test_a_long_permutation_looks_random():
    n = 100_000
    out = permute(np.arange(n), n, make_key("test"))
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.02
    assert abs(np.abs(np.diff(out)).mean() / n - 1 / 3) < 0.01
    assert np.sum(out == np.arange(n)) < 10  # one fixed point is expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**31 - 1), st.integers(0, 10**6))
def test_document_order_is_a_permutation_of_whole_blocks(n, seed, epoch):
    order = document_order(n, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(n))
    block = order // (int(np.ceil(np.sqrt(n))))
    assert np.sum(np.diff(block) != 0) == len(set(block.tolist())) - 1  # a block's documents stay together


def test_order_changes_with_epoch_and_seed_and_within_blocks():
    first, second, other = document_order(100, 0, 0), document_order(100, 0, 1), document_order(100, 1, 0)
    for order in (second, other):
        assert np.mean(order == first) < 0.2
    assert np.array_equal(first, document_order(100, 0, 0))
    inner = {tuple(first[first // 10 == block] % 10) for block in range(10)}
    assert len(inner) == 10  # each block has its own order


def test_shuffles_never_change():
    """A new order here would silently change the token stream of every run that is resumed."""
    assert permute(np.arange(10), 10, make_key("rows", 0, 0)).tolist() == [8, 3, 0, 9, 6, 1, 4, 2, 5, 7]
    assert document_order(10, 0, 0).tolist() == [6, 7, 5, 4, 8, 9, 0, 1, 3, 2]
