"""Rows that go on from step to step: each lane reads its documents in order, and all lanes read every token."""

import collections

import numpy as np
import pytest

from lcx.config import Config
from lcx.data import batch, check_data
from lcx.data.shuffle import document_order
from lcx.data.sources import load_corpus
from lcx.errors import UserError


def make(tmp_path, documents, *, batch_size=3, length=8, sources=None, **data):
    if sources is None:
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        for i, content in enumerate(documents):
            (folder / f"{i:03}").write_bytes(content)
        sources = [{"name": "test", "path": str(folder)}]
    return Config.from_dict(
        {
            "data": {"sources": sources, **data},
            "train": {"batch_size": batch_size, "sequence_length": length, "carry_state": True},
        }
    )


DOCUMENTS = [bytes(range(a, b)) for a, b in ((0, 50), (50, 53), (53, 54), (54, 90), (90, 101), (101, 131))]


def stream_of(config, epochs):
    """(token, depth in its document) of the shuffled documents of epochs."""
    documents = load_corpus(config.data).parts[0].train
    for epoch in range(epochs):
        for document in document_order(len(documents), config.data.seed, epoch):
            tokens = documents.tokens[documents.offsets[document] : documents.offsets[document + 1]]
            yield [(int(token), depth) for depth, token in enumerate(tokens)]


@pytest.mark.parametrize("length", [5, 8, 60])
@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_lanes_equal_a_naive_construction(tmp_path, length, lanes):
    config = make(tmp_path, DOCUMENTS, batch_size=lanes, length=length)
    epochs = [[pair for document in stream_of(config, 6) for pair in document]]
    total = load_corpus(config.data).parts[0].train.total
    stream = epochs[0]
    steps = 4 * total // lanes // length
    rows = [batch(config, index) for index in range(steps)]
    for lane in range(lanes):
        first, last = lane * total // lanes, (lane + 1) * total // lanes
        expected = []
        for epoch in range(5):
            position = 0
            for place in range(epoch * total + first, epoch * total + last):
                (token, depth), (target, target_depth) = stream[place], stream[place + 1]
                position = 0 if depth == 0 or place == epoch * total + first else position + 1
                expected.append((token, target, position, float(target_depth > 0)))
        got = [
            np.concatenate([row[name][lane] for row in rows]).tolist()
            for name in ("tokens", "targets", "positions", "loss_weights")
        ]
        assert list(zip(*got, strict=True)) == expected[: steps * length]
    for row in rows:
        starts = row["positions"] == 0
        assert np.array_equal(np.diff(row["segment_ids"]) > 0, starts[:, 1:]) and np.all(row["segment_ids"][:, 0] == 1)


def test_each_token_is_a_target_once_an_epoch(tmp_path):
    config = make(tmp_path, DOCUMENTS, batch_size=4, length=8)  # 131 tokens: lanes of 32 and 33
    total = load_corpus(config.data).parts[0].train.total
    found = collections.Counter()
    for lane in range(4):
        size = (lane + 1) * total // 4 - lane * total // 4
        targets = np.concatenate([batch(config, i, [lane])["targets"][0] for i in range(6)])
        weights = np.concatenate([batch(config, i, [lane])["loss_weights"][0] for i in range(6)])
        found.update(targets[:size][weights[:size] > 0].tolist())
    documents = load_corpus(config.data).parts[0].train
    inner = set(documents.tokens.tolist()) - {int(documents.tokens[a]) for a in documents.offsets[:-1]}
    assert found == dict.fromkeys(inner, 1)


def test_positions_count_up_across_rows_and_rows_by_themselves_are_the_same(tmp_path):
    config = make(tmp_path, [bytes(range(200)), bytes(range(200, 250))], batch_size=2, length=16)
    whole = [batch(config, i) for i in range(12)]
    carried = 0
    for i, one in enumerate(whole):
        for rows in ([1], [1, 0]):
            part = batch(config, i, rows)
            assert all(np.array_equal(part[name], one[name][rows]) for name in one)
        if i:
            for lane in (0, 1):
                goes_on = one["positions"][lane, 0] > 0
                carried += goes_on
                if goes_on:
                    assert one["positions"][lane, 0] == whole[i - 1]["positions"][lane, -1] + 1
                    assert one["tokens"][lane, 0] == whole[i - 1]["targets"][lane, -1]
    assert carried > 15


def test_a_document_longer_than_positions_allow_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lcx.data.pipeline.LONGEST", 49)
    with pytest.raises(
        UserError, match="the document 000 has 50 tokens, more than positions that are carried can count"
    ):
        check_data(make(tmp_path, DOCUMENTS))


def test_each_source_has_lanes_of_its_own(tmp_path):
    sources = []
    for name, letter, weight in (("a", b"a", 3), ("b", b"b", 1)):
        (tmp_path / name).write_bytes(letter * 100)
        sources.append({"name": name, "path": str(tmp_path / name), "weight": weight})
    config = make(tmp_path, [], batch_size=4, sources=sources)
    for index in (0, 7, 1000):
        assert [bytes(row).decode()[0] for row in batch(config, index)["tokens"].tolist()] == list("aaab")
    with pytest.raises(UserError, match="2 datasets do not divide the 1 rows of a batch"):
        check_data(make(tmp_path, [], batch_size=1, sources=sources))
