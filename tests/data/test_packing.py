"""The training stream against one that plain Python builds token by token."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.data import batch
from lcx.data.documents import Documents
from lcx.data.packing import last_of_all, make_batch, read_piece
from lcx.data.rows import permute_rows
from lcx.data.shuffle import document_order
from lcx.data.sources import load_corpus
from lcx.data.stream import Spans

# All bytes differ, so that a token says which one it is: 50 of them, in documents longer and shorter than most rows.
DOCUMENTS = [bytes(range(a, b)) for a, b in itertools.pairwise([1, 20, 21, 22, 30, 34, 51])]
FIRST = {document[0] for document in DOCUMENTS}
TOTAL = sum(map(len, DOCUMENTS))
START = 256  # the start token


def row(config, index):
    """Row `index` of the run, counted before the permutation."""
    size = config.train.batch_size
    return {name: array[0] for name, array in batch(config, index // size, rows=[index % size]).items()}


def naive_stream(config, epochs):
    """(token, epoch, is its document's first) of the whole stream."""
    documents = load_corpus(config.data).parts[0].train
    for epoch in range(epochs):
        for document in document_order(len(documents), config.data.seed, epoch):
            for place in range(documents.offsets[document], documents.offsets[document + 1]):
                yield int(documents.tokens[place]), epoch, place == documents.offsets[document]


@pytest.mark.parametrize("length", [1, 7, 16, 50, 120])
def test_rows_equal_a_naive_construction(make_config, length):
    config = make_config(DOCUMENTS, length=length, batch_size=3)
    stream = list(naive_stream(config, epochs=4 + 2 * length // TOTAL))
    rows = np.arange(3 * TOTAL // length)
    where = permute_rows(rows, TOTAL, length, config.data.seed)
    for index in rows:
        start = where[index] * length
        expected = {"tokens": [], "targets": [], "segment_ids": [], "positions": [], "loss_weights": []}
        segment, position = 0, 0
        for offset in range(length):
            token, _, first = stream[start + offset]
            target, _, target_first = stream[start + offset + 1]
            if first or offset == 0:
                segment, position = segment + 1, 0
            values = (token, target, segment, position, 0.0 if target_first else 1.0)
            for name, value in zip(expected, values, strict=True):
                expected[name].append(value)
            position += 1
        got = row(config, int(index))
        assert got.pop("row_index") == index
        assert {name: array.tolist() for name, array in got.items()} == expected


@pytest.mark.parametrize("length", [2, 3, 7, 16, 50, 57, 120])
def test_rows_with_a_start_token_equal_a_naive_construction(make_config, length):
    config = make_config(DOCUMENTS, length=length, batch_size=3, start_token=START)
    total, owned = TOTAL + len(DOCUMENTS), length - 1
    stream = list(naive_stream(config, epochs=4 + 2 * length // total))
    assert sum(token == START for token, _, _ in stream) == sum(first for _, _, first in stream) > 0
    rows = np.arange(3 * total // owned)
    where = permute_rows(rows, total, owned, config.data.seed)
    heads = Counter()
    for index in rows:
        start = where[index] * owned
        places = list(range(start, start + length + 1))
        cut = not stream[start][2]
        heads[cut] += 1
        if cut:
            places = [None, *places[:-1]]
        expected = {"tokens": [], "targets": [], "segment_ids": [], "positions": [], "loss_weights": []}
        segment, position = 0, 0
        for here, following in itertools.pairwise(places):
            if here is None or stream[here][2]:
                segment, position = segment + 1, 0
            target, _, target_first = stream[following]
            mine = start < following <= start + owned
            token = START if here is None else stream[here][0]
            values = (token, target, segment, position, 1.0 if mine and not target_first else 0.0)
            for name, value in zip(expected, values, strict=True):
                expected[name].append(value)
            position += 1
        got = row(config, int(index))
        assert got.pop("row_index") == index
        assert {name: array.tolist() for name, array in got.items()} == expected
    assert heads[True] and heads[False] or owned >= total


@pytest.mark.parametrize("length", [2, 5, 8, 26, 57, 64])
def test_with_a_start_token_each_other_token_is_a_target_once_an_epoch(make_config, length):
    """Also each document's first: it follows the start token. What it predicts from is its document's, or that."""
    config = make_config(DOCUMENTS, length=length, batch_size=3, start_token=START)
    total, owned = TOTAL + len(DOCUMENTS), length - 1
    epochs = math.lcm(owned, total) // total
    scored = Counter()
    for index in range(epochs * total // owned):
        got = row(config, index)
        here = got["loss_weights"] == 1
        scored.update(got["targets"][here].tolist())
        for token, target in zip(got["tokens"][here].tolist(), got["targets"][here].tolist(), strict=True):
            assert target in FIRST if token == START else target == token + 1
        assert np.array_equal(got["tokens"] == START, got["positions"] == 0)
        assert not np.any((got["tokens"][1:] == START) & (got["tokens"][:-1] == START))
        assert set(np.unique(got["loss_weights"])) <= {0, 1}
    assert scored == dict.fromkeys(itertools.chain(*DOCUMENTS), epochs)


@pytest.mark.parametrize("length", [1, 4, 7, 25, 50, 64])
def test_each_token_but_a_documents_first_is_a_target_once_an_epoch(make_config, length):
    """Over k epochs that end where a row ends, and in each epoch by itself where rows do not straddle its border."""
    config = make_config(DOCUMENTS, length=length, batch_size=3)
    epochs = math.lcm(length, TOTAL) // TOTAL
    scored, all_targets = Counter(), Counter()
    for index in range(epochs * TOTAL // length):
        got = row(config, index)
        all_targets.update(got["targets"].tolist())
        scored.update(got["targets"][got["loss_weights"] == 1].tolist())
        assert set(np.unique(got["loss_weights"])) <= {0, 1}
    inner = {token for document in DOCUMENTS for token in document[1:]}
    assert scored == dict.fromkeys(inner, epochs)
    assert set(all_targets) - set(scored) <= FIRST and sum(all_targets.values()) == epochs * TOTAL


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 700), st.integers(0, 3), st.integers(0, 2000))
def test_rows_are_permuted_among_those_that_start_in_the_epoch(total, length, seed, epoch):
    starting = np.array([i for i in range(epoch * total // length, (epoch + 1) * total // length + 1)], np.int64)
    starting = starting[starting * length // total == epoch]
    permuted = permute_rows(starting, total, length, seed)
    assert np.array_equal(np.sort(permuted), starting)


def test_epochs_and_seeds_reshuffle_documents_and_rows(make_config):
    config = make_config([bytes([i]) * 5 for i in range(40)], length=10, batch_size=20)
    other = make_config([bytes([i]) * 5 for i in range(40)], length=10, batch_size=20, seed=1)
    documents = load_corpus(config.data).parts[0].train
    orders = [tuple(document_order(len(documents), seed, epoch)) for seed in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == 6
    rows = np.arange(60)
    epochs = permute_rows(rows, 200, 10, 0).reshape(3, 20) - np.array([[0], [20], [40]])
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(20))}) == 4  # none is the identity
    streams = [batch(config, epoch)["tokens"] for epoch in range(3)] + [batch(other, 0)["tokens"]]
    assert len({stream.tobytes() for stream in streams}) == 4
    for stream in streams:
        assert Counter(stream.ravel().tolist()) == dict.fromkeys(range(40), 5)


def test_padding_is_a_segment_of_its_own():
    documents = Documents(np.arange(5, 8, dtype=np.uint8), np.array([0, 2, 3]), ["a", "b"])
    spans = Spans(np.array([0, 1]), np.array([0, 0]), np.array([2, 1]))
    got = make_batch([[last_of_all(read_piece(documents, spans))]], 5, np.array([4]))
    assert got["tokens"].tolist() == [[5, 6, 7, 0, 0]] and got["targets"].tolist() == [[6, 7, 0, 0, 0]]
    assert got["segment_ids"].tolist() == [[1, 1, 2, 0, 0]]
    assert got["positions"].tolist() == [[0, 1, 0, 0, 1]]
    assert got["loss_weights"].tolist() == [[1, 0, 0, 0, 0]]
