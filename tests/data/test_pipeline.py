import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lcx.data.pipeline
from lcx.config import Config
from lcx.data import batch, heldout_batches, heldout_documents, read_ahead
from lcx.data.stream import chapter, epoch_table
from lcx.errors import UserError

START = 256  # the start token
SHAPES = {"tokens": 2, "targets": 2, "segment_ids": 2, "positions": 2, "loss_weights": 2, "row_index": 1}


def documents(count):
    """Different documents of 1 to 32 bytes, the same everywhere, after one that is longer than any row below."""
    digests = (hashlib.sha256(str(i).encode()).digest() for i in range(count - 1))
    return [bytes(range(100)), *(digest[: 1 + digest[0] % 32] for digest in digests)]


def digest(batches):
    hasher = hashlib.sha256()
    for one in batches:
        for name, array in sorted(one.items()):
            hasher.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hasher.hexdigest()


def with_workers(config, workers):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))


def grain_threads():
    return [thread.name for thread in threading.enumerate() if "grain" in thread.name]


def test_shapes_and_dtypes(make_config):
    config = make_config(documents(20), batch_size=3, length=16)
    got = batch(config, 5)
    assert {name: array.ndim for name, array in got.items()} == SHAPES
    for name, array in got.items():
        assert array.shape == (3, 16)[: SHAPES[name]]
        assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)
    assert got["row_index"].tolist() == [15, 16, 17]
    assert digest([got]) == digest([batch(config.to_dict(), 5)])


@pytest.mark.parametrize("start_token", [None, START])
def test_batch_is_pure(make_config, start_token):
    """Whatever was read before, in whatever order and in whatever parts."""
    config = make_config(documents(30), batch_size=4, length=16, start_token=start_token)
    indices = list(range(40)) + [10**6, 10**9]
    in_order = {index: digest([batch(config, index)]) for index in indices}
    assert len(set(in_order.values())) == len(indices)
    chapter.cache_clear()
    epoch_table.cache_clear()
    np.random.default_rng(0).shuffle(indices)
    for index in indices:
        assert digest([batch(config, index)]) == in_order[index]
        whole = batch(config, index)
        for rows in ([2], [3, 0], [], [1, 1, 2], range(4)):
            part = batch(config, index, rows)
            for name, array in whole.items():
                assert np.array_equal(part[name], array[np.array(list(rows), int)]) and part[name].dtype == array.dtype


@pytest.mark.parametrize(
    "start_token, training, heldout",
    [
        (
            None,
            "716bc6af29d689ac3982496b08e7017e0baef563e5f1969c6e6ebf78473209b2",
            "ed2bed1ce931a6e24d3f8ff36911e0b0d08b22e38288d7ad7dcecd6b8f845cf9",
        ),
        (
            START,
            "258eb72f47594a3765ebcf31baefe188b98e0e82ce96e074e81335bb858f38fb",
            "c7140a14f74ca30c661b8d384998b9c77b9dd2097c710a2b6e8fe727601eb8ad",
        ),
    ],
)
def test_the_stream_never_changes(make_config, start_token, training, heldout):
    """Golden hashes: a run that is resumed with a later version reads the same batches."""
    config = make_config(documents(30), HELDOUT, batch_size=4, length=16, seed=7, start_token=start_token)
    assert digest(batch(config, index) for index in range(100)) == training
    assert digest(heldout_batches(config)) == heldout


def test_a_far_batch_costs_no_more_than_a_near_one(make_config):
    config = make_config(documents(200), batch_size=8, length=512)
    batch(config, 0)

    def quickest(index):
        def seconds():
            start = time.perf_counter()
            batch(config, index)
            return time.perf_counter() - start

        return min(seconds() for _ in range(10))

    assert quickest(10**7) < 10 * quickest(0) + 0.01


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_reading_ahead_gives_the_same_stream(make_config, workers):
    config = with_workers(make_config(documents(30), batch_size=4, length=16), workers)
    reader = read_ahead(config, 17)
    pairs = list(itertools.islice(reader, 60))
    assert bool(grain_threads()) == (workers > 0) and not multiprocessing.active_children()
    reader.close()
    assert [index for index, _ in pairs] == list(range(17, 77))
    assert digest(one for _, one in pairs) == digest(batch(config, index) for index in range(17, 77))
    deadline = time.monotonic() + 5
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()


def test_closing_drops_what_was_not_begun(make_config, monkeypatch):
    config = with_workers(make_config(documents(30)), 1)
    begun, may_go_on = [], threading.Event()

    def slow(config, index, rows):
        begun.append(index)
        if index > 0:
            may_go_on.wait(10)
        return batch(config, index)

    monkeypatch.setattr(lcx.data.pipeline, "batch", slow)
    reader = read_ahead(config, 0)
    next(reader)
    while begun != [0, 1]:
        time.sleep(0.01)
    reader.close()
    may_go_on.set()
    while grain_threads():
        time.sleep(0.01)
    assert begun == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_keep_their_type_and_place(make_config, monkeypatch, workers):
    config = with_workers(make_config(documents(30)), workers)

    def faulty(config, index, rows):
        if index == 6:
            raise UserError("record 6 is bad.")
        return batch(config, index)

    monkeypatch.setattr(lcx.data.pipeline, "batch", faulty)
    reader = read_ahead(config, 3)
    assert [index for index, _ in itertools.islice(reader, 3)] == [3, 4, 5]
    with pytest.raises(UserError, match="record 6 is bad"):
        next(reader)


def test_user_errors_come_before_the_first_batch(tmp_path, make_config):
    missing = Config.from_dict({"data": {"sources": [{"name": "mine", "path": tmp_path / "absent"}]}})
    for call in (read_ahead, heldout_documents, lambda config: batch(config, 0), lambda c: next(heldout_batches(c))):
        with pytest.raises(UserError, match='"mine": there is no file or folder'):
            call(missing)
    config = make_config(documents(3))
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(UserError, match='model.vocab_size is 100, but the tokenizer "bytes" has 256 tokens'):
        read_ahead(small)
    config = make_config(documents(3), start_token=START)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=256))
    with pytest.raises(UserError, match='"bytes" with data.start_token=256 has 257 tokens: set it to at least that'):
        read_ahead(small)
    with pytest.raises(UserError, match="train.sequence_length must be at least 2 with data.start_token=256"):
        read_ahead(make_config(documents(3), length=1, start_token=START))


def test_an_open_reader_does_not_keep_the_process_alive(make_config):
    config = make_config(documents(30))
    program = (
        "import sys, json; from lcx.data import read_ahead\n"
        "reader = read_ahead(json.loads(sys.argv[1]), 0); next(reader); print('read', flush=True)"
    )

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, json.dumps(config.to_dict())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


HELDOUT = [bytes(range(1, 20)), b"\x14", bytes(range(21, 30)), bytes(range(30, 60)), b"\x3c"]


@pytest.mark.parametrize("length", [1, 4, 20, 59, 60, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_heldout_pass_scores_each_token_once(make_config, length, batch_size):
    config = make_config([b"train"], HELDOUT, length=length, batch_size=batch_size)
    batches = list(heldout_batches(config))
    rows = {name: np.concatenate([one[name] for one in batches]) for name in SHAPES}
    count = -(-59 // length)
    assert rows["row_index"][:count].tolist() == list(range(count))
    assert len(rows["tokens"]) < -(-60 // length) + batch_size

    stream = b"".join(HELDOUT)
    first = {document[0] for document in HELDOUT}
    assert rows["targets"][rows["loss_weights"] == 1].tolist() == [byte for byte in stream if byte not in first]
    real = rows["segment_ids"] > 0
    assert rows["tokens"][real].tolist() in (list(stream), list(stream[:-1]))  # the last one predicts nothing
    # The token before a target of weight 1 is of its document: one less, as each document counts up.
    scored = rows["loss_weights"] == 1
    assert np.array_equal(rows["tokens"][scored] + 1, rows["targets"][scored])
    assert not rows["tokens"][~real].any() and not rows["loss_weights"][~real].any()
    for tokens, segments, positions in zip(rows["tokens"], rows["segment_ids"], rows["positions"], strict=True):
        starts = [t for t in range(length) if t == 0 or segments[t] != segments[t - 1]]
        assert [t for t in range(length) if positions[t] == 0] == starts
        assert all(positions[t] == positions[t - 1] + 1 for t in range(length) if t not in starts)
        shown = segments[segments > 0]
        assert shown.tolist() == sorted(shown) and set(shown.tolist()) == set(range(1, shown.max(initial=0) + 1))
        assert all(t == 0 or segments[t] == 0 or tokens[t] in first for t in starts)


@pytest.mark.parametrize("length", [2, 3, 5, 21, 64, 65, 66, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_heldout_pass_with_a_start_token_scores_each_byte_once(make_config, length, batch_size):
    config = make_config([b"train"], HELDOUT, length=length, batch_size=batch_size, start_token=START)
    batches = list(heldout_batches(config))
    rows = {name: np.concatenate([one[name] for one in batches]) for name in SHAPES}
    stream, first = b"".join(HELDOUT), {document[0] for document in HELDOUT}
    count = -(-(len(stream) + len(HELDOUT) - 1) // (length - 1))
    assert rows["row_index"][:count].tolist() == list(range(count)) and len(rows["tokens"]) < count + batch_size

    scored, real = rows["loss_weights"] == 1, rows["segment_ids"] > 0
    assert rows["targets"][scored].tolist() == list(stream)
    for token, target in zip(rows["tokens"][scored].tolist(), rows["targets"][scored].tolist(), strict=True):
        assert target in first if token == START else target == token + 1
    assert np.array_equal((rows["tokens"] == START)[real], (rows["positions"] == 0)[real])
    assert not np.any((rows["tokens"][:, 1:] == START) & (rows["tokens"][:, :-1] == START))
    assert real[:count, 0].all() and not real[count:].any() and not rows["tokens"][~real].any()
    starts = rows["positions"] == 0
    assert starts[:, 0].all() and np.array_equal(np.diff(rows["segment_ids"]) != 0, starts[:, 1:])
    assert np.all(np.diff(rows["positions"])[~starts[:, 1:]] == 1)


@pytest.mark.parametrize("max_rows", [0, 1, 2, 3, 100])
# Rows that own 20 and 19 tokens; the second ends a row where a document ends.
@pytest.mark.parametrize("length, start_token", [(20, None), (19, None), (21, START), (20, START)])
def test_a_yardstick_can_score_the_same_rows(make_config, max_rows, length, start_token):
    config = make_config([b"train"], HELDOUT, length=length, batch_size=2, start_token=start_token)
    batches = list(heldout_batches(config, max_rows))
    assert len(batches) == (1 if max_rows in (1, 2) else 2)
    length -= start_token is not None
    targets = np.concatenate([one["targets"][one["loss_weights"] == 1] for one in batches])
    chosen = heldout_documents(config, max_rows)
    inner = [chosen.tokens[a + 1 : b] for a, b in itertools.pairwise(chosen.offsets)]
    assert np.array_equal(np.concatenate(inner), targets)
    assert len(inner) == len(chosen.names) and all(np.diff(chosen.offsets) > 0)
    if 0 < max_rows < 3:
        assert chosen.tokens.size == max_rows * (length + 1)
    if (max_rows, length) == (2, 19):  # of four rows
        assert np.concatenate([one["row_index"] for one in batches])[1] == 2


def test_nothing_held_out_is_no_batch(make_config):
    assert list(heldout_batches(make_config([b"train"]))) == []
    assert list(heldout_batches(make_config([b"train"], [b"x"]))) == []


def test_larger_vocabularies(tmp_path, make_config):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "red": 299, "green": 70_000, "blue": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    config = make_config([b"red green blue black"], length=4, tokenizer=str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="has 70001 tokens"):
        batch(config, 0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=70_001))
    assert batch(config, 0)["tokens"].tolist() == [[299, 70_000, 5, 0]] * 2
