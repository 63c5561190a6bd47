"""Several sources by weight, lengths, loss weights, best-fit rows and stages: exact, and each batch by itself."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx.config import Config
from lcx.data import batch, check_data, load_mixture
from lcx.data.bestfit import best_fit, load_plan, pack
from lcx.data.documents import Documents, by_length
from lcx.data.mixture import BLOCK, apportion, assign, counts, quotas
from lcx.data.sources import load_corpus
from lcx.errors import UserError

NAMES = ("tokens", "targets", "segment_ids", "positions", "loss_weights", "row_index")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_corpus(folder, letters, lengths):
    """Different documents of these lengths and three bytes more, of these letters."""
    folder.mkdir()
    for i, length in enumerate(lengths):
        content = bytes(letters[(i + j) % len(letters)] for j in range(length))
        (folder / f"{i:04}").write_bytes(bytes([letters[0]]) + content + i.to_bytes(2))
    return str(folder)


def make(sources, *, length=32, batch_size=8, train=None, **data):
    return Config.from_dict(
        {
            "data": {"sources": sources, **data},
            "model": {"vocab_size": 300},
            "train": {"batch_size": batch_size, "sequence_length": length, **(train or {})},
        }
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.integers(0, 3), st.integers(0, 2**40))
def test_quotas_are_exact_in_each_block_and_rows_come_once(weights, seed, block):
    quota = quotas(weights)
    assert quota.sum() == BLOCK and np.all(np.abs(quota - np.array(weights) / sum(weights) * BLOCK) < 1.001 + 1e-9)
    dataset, number = assign(block * BLOCK + np.arange(BLOCK), quota, seed)
    assert np.array_equal(np.bincount(dataset, minlength=len(quota)), quota)
    for i, expected in enumerate(quota):
        if len(quota) > 1:
            assert np.array_equal(np.sort(number[dataset == i]), block * expected + np.arange(expected))


def test_shares_hold_in_every_short_stretch():
    quota = quotas([0.5, 0.3, 0.15, 0.05])
    dataset, _ = assign(np.arange(3 * BLOCK), quota, 0)
    for size, most in ((64, 2), (512, 3)):
        counted = np.stack([np.bincount(piece, minlength=4) for piece in dataset.reshape(-1, size)])
        assert np.abs(counted - size * quota / BLOCK).max() <= most
    assert len({tuple(piece) for piece in dataset.reshape(-1, 64)[:100]}) == 100  # no fixed pattern
    for rows in (0, 1, 1000, BLOCK, 2 * BLOCK + 77):
        assert np.array_equal(counts(rows, quota, 0), np.bincount(dataset[:rows], minlength=4))


def test_apportioning_leaves_no_dataset_out():
    assert apportion([1, 1e-9], 8).tolist() == [7, 1]
    assert apportion([3, 1], 8).tolist() == [6, 2]
    assert apportion([1, 1, 1], 8).tolist() == [3, 3, 2]


def three_sources(tmp_path):
    a = write_corpus(tmp_path / "a", b"abcdefg", [5, 40, 100, 3, 60] * 5)
    b = write_corpus(tmp_path / "b", b"012345", [200, 10, 33] * 6)
    c = write_corpus(tmp_path / "c", b"#+-*/", [9] * 20)
    return [
        {"name": "a", "path": a, "weight": 2, "length_weights": {"50": 3}},
        {"name": "b", "path": b, "weight": 1, "loss_weight": 0.25},
        {"name": "c", "path": c, "weight": 1},
    ]


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_batches_of_mixtures_are_pure(tmp_path, packing):
    config = make(three_sources(tmp_path), packing=packing)
    indices = [*range(30), 10**6, 10**8]
    whole = {index: batch(config, index) for index in indices}
    for index in reversed(indices):
        for rows in ([3], [7, 0], []):
            part = batch(config, index, rows)
            for name in NAMES:
                assert np.array_equal(part[name], whole[index][name][np.array(rows, int)])
    everything = np.concatenate([whole[index]["tokens"] for index in range(30)])
    letters = {"a": b"abcdefg", "b": b"012345", "c": b"#+-*/"}
    source = [max(letters, key=lambda name: sum(t in letters[name] for t in row)) for row in everything.tolist()]
    found = collections.Counter(source)
    assert abs(found["a"] - 120) <= 4 and abs(found["b"] - 60) <= 4 and abs(found["c"] - 60) <= 4
    weights = np.concatenate([whole[index]["loss_weights"] for index in range(30)])
    for name, expected in (("a", {0, 1}), ("b", {0, 0.25}), ("c", {0, 1})):
        assert set(np.unique(weights[np.array(source) == name])) == expected


def test_long_documents_are_read_as_often_as_asked(tmp_path):
    path = write_corpus(tmp_path / "a", b"abcdefgh", [20] * 40 + [400] * 10)
    config = make([{"name": "a", "path": path, "length_weights": {"100": 4}}])
    mixed = load_mixture(config, 0)
    (short, long) = mixed.datasets
    assert [set(one.packer.documents.lengths(slice(None)).tolist()) for one in mixed.datasets] == [{23}, {403}]
    expected = 4 * long.packer.documents.total / (4 * long.packer.documents.total + short.packer.documents.total)
    assert mixed.quota[1] / BLOCK == pytest.approx(expected, abs=2e-5)
    never = make([{"name": "a", "path": path, "length_weights": {"0": 0, "100": 1}}])
    assert len(load_mixture(never, 0).datasets) == 1


def test_by_length_is_a_partition():
    documents = Documents(np.arange(60, dtype=np.uint8), np.array([0, 5, 10, 30, 31, 60]), list("abcde"))
    parts = by_length(documents, [0, 5, 20])
    assert [part.chosen.tolist() for part in parts] == [[3], [0, 1], [2, 4]]
    assert [part.total for part in parts] == [1, 10, 49]
    tokens, weights = parts[2].read(np.array([1]), np.array([2]), np.array([3]))
    assert tokens.tolist() == [33, 34, 35] and weights.tolist() == [1, 1, 1] and parts[2].name(0) == "c"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(2, 24), st.integers(0, 1))
def test_a_plan_holds_each_token_once(lengths, length, overhead):
    """As an input, but for each document's last; no row is too full."""
    lengths = np.array(lengths)
    ends, spans = pack(np.arange(len(lengths)), lengths, length, overhead)
    seen = [np.zeros(n, int) for n in lengths]
    for first, last in itertools.pairwise([0, *ends.tolist()]):
        assert 0 < sum(count + (overhead if start else 0) for _, start, count in spans[first:last].tolist()) <= length
    for document, start, count in spans.tolist():
        seen[document][start : start + count] += 1
    assert all(found[:-1].tolist() == [1] * (n - 1) and found[-1] == 0 for found, n in zip(seen, lengths, strict=True))


def test_best_fit_is_best_fit():
    assert best_fit(np.arange(5), np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    assert best_fit(np.arange(4), np.array([7, 6, 4, 3]), 10) == [[0, 3], [1, 2]]  # 3 goes where 3 is left, not 4


@pytest.mark.parametrize("start_token", [None, 256])
@pytest.mark.parametrize("length", [16, 33])
def test_best_fit_targets_each_token_once_an_epoch(tmp_path, length, start_token):
    path = write_corpus(tmp_path / "a", b"abcdefg", [5, 40, 100, 3, 60, 16, 17, 33, 34] * 5)
    config = make([{"name": "a", "path": path}], length=length, packing="best_fit", start_token=start_token)
    rows = len(load_mixture(config, 0).datasets[0].packer.plan)
    documents = load_corpus(config.data).parts[0].train
    expected = collections.Counter()
    for a, b in itertools.pairwise(documents.offsets):
        expected.update(zip(documents.tokens[a : b - 1].tolist(), documents.tokens[a + 1 : b].tolist(), strict=True))
    orders = []
    for epoch in range(2):
        found, waste, order = collections.Counter(), 0, []
        for row in range(epoch * rows, (epoch + 1) * rows):
            got = {name: array[0] for name, array in batch(config, row // 8, [row % 8]).items()}
            scored = got["loss_weights"] > 0
            found.update(zip(got["tokens"][scored].tolist(), got["targets"][scored].tolist(), strict=True))
            waste += int(np.sum(got["segment_ids"] == 0))
            order.append(got["tokens"].tobytes())
            starts = np.flatnonzero(np.diff(got["segment_ids"], prepend=0) != 0)
            assert np.array_equal(np.flatnonzero(got["positions"] == 0), starts)
            if start_token is not None:
                assert np.array_equal((got["tokens"] == 256), (got["positions"] == 0) & (got["segment_ids"] > 0))
            else:
                assert np.array_equal(scored, got["segment_ids"] > 0)
        if start_token is not None:  # what follows an inserted start token is not scored there
            assert sum(found.values()) == sum(expected.values())
            expected_targets = collections.Counter()
            for (_, target), n in expected.items():
                expected_targets[target] += n
            targets = collections.Counter()
            for (_, target), n in found.items():
                targets[target] += n
            assert targets == expected_targets
        else:
            assert found == expected
        assert waste / (rows * length) < 0.05
        orders.append(order)
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    documents = Documents(np.zeros(100, np.uint8), np.arange(0, 101, 10), ["x"] * 10)
    plan = load_plan(documents, "f" * 64, 8, 0, None)
    assert isinstance(plan.spans, np.memmap) and len(plan) >= 12
    monkeypatch.setattr("lcx.data.bestfit.pack", None)
    again = load_plan(documents, "f" * 64, 8, 0, None)
    assert np.array_equal(again.spans, plan.spans)
    with pytest.raises(TypeError):
        load_plan(documents, "f" * 64, 9, 0, None)
    assert {path.name[0] for path in (tmp_path / "cache" / "lcx" / "plans").iterdir()} != {"."}
    assert not [path for path in (tmp_path / "cache" / "lcx" / "plans").iterdir() if path.name[0] == "."]


def test_stages_have_their_own_addresses(tmp_path):
    sources = three_sources(tmp_path)
    stages = [{"step": 10, "sequence_length": 64, "batch_size": 4}, {"step": 20, "weights": {"c": 1, "a": 0}}]
    config = make(sources, train={"stages": stages})
    plain = make(sources)
    for index in (0, 9):
        assert all(np.array_equal(batch(config, index)[name], batch(plain, index)[name]) for name in NAMES)
    assert batch(config, 10)["tokens"].shape == (4, 64) and batch(config, 20)["tokens"].shape == (8, 32)
    rows = [batch(config, index)["row_index"] for index in (9, 10, 19, 20)]
    assert [row[0] for row in rows] == [72, 80, 116, 120] and [len(row) for row in rows] == [8, 4, 4, 8]
    assert set(np.unique(batch(config, 25)["tokens"])) <= set(b"#+-*/") | set(range(20))
    assert not np.array_equal(batch(config, 20)["tokens"], batch(make(sources[2:]), 0)["tokens"])  # another order


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": {"stages": [{"step": 5}, {"step": 5}]}}, r"train.stages\[1\].step = 5 goes backwards"),
        ({"train": {"stages": [{"step": 5, "weights": {"d": 1}}]}}, 'no source is called "d"'),
        ({"train": {"stages": [{"step": 5, "weights": {"a": 0}}]}}, "are all 0"),
        ({"train": {"stages": [{"step": 5, "weights": {"a": -1}}]}}, "must be at least 0"),
        ({"train": {"carry_state": True}, "packing": "best_fit"}, "needs data.packing=concatenate"),
        ({"train": {"carry_state": True}, "batch_size": 2}, "4 datasets do not divide the 2 rows"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(tmp_path, change, message):
    sources = three_sources(tmp_path)
    with pytest.raises(UserError, match=message):
        check_data(make(sources, **change))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"length_weights": {"long": 2}}, 'length_weights are by length in tokens, like "8192", not "long"'),
        ({"length_weights": {"10": -1}}, "length_weights must be at least 0"),
        ({"length_weights": {"0": 0, "9999": 1}}, "no document has a length that length_weights wants"),
    ],
)
def test_bad_length_weights_are_one_sentence(tmp_path, fields, message):
    path = write_corpus(tmp_path / "a", b"ab", [5] * 3)
    with pytest.raises(UserError, match=message):
        check_data(make([{"name": "a", "path": path, **fields}]))


def test_what_a_record_masks_is_no_target(tmp_path):
    record = {"prompt": "Name a letter. ", "completion": "B"}
    more = {"pieces": [{"text": "xx", "loss": False}, {"text": "yy"}, {"text": "zz", "loss": False}]}
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, [record, more, {"text": "all"}])))
    for packing in ("concatenate", "best_fit"):
        config = make([{"name": "chat", "path": str(tmp_path / "chat.jsonl")}], length=8, packing=packing)
        scored = collections.Counter()
        rows = [batch(config, i) for i in range(2)]
        for got in rows:
            scored.update(bytes(got["targets"][got["loss_weights"] > 0].tolist()).decode())
        assert set(scored) <= set("By" + "ll") and scored["B"] and scored["y"] and scored["l"]


def test_a_source_that_is_all_another_ones_is_named(tmp_path):
    path = write_corpus(tmp_path / "a", b"ab", [5] * 3)
    config = make([{"name": "a", "path": path}, {"name": "b", "path": path}])
    with pytest.raises(UserError, match='"b": the corpus is empty: .* that another source does not have'):
        check_data(config)


def test_a_config_with_another_weight_is_not_read_again(tmp_path):
    config = make(three_sources(tmp_path))
    other = dataclasses.replace(config.data.sources[0], weight=7.0, length_weights={})
    changed = dataclasses.replace(config.data, sources=(other, *config.data.sources[1:]))
    assert load_corpus(changed) is load_corpus(config.data)
