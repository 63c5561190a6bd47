"""Prepared data: the same documents as the text has, whatever made it, and no damage in silence."""

import gzip
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lcx.cli.main import main
from lcx.config import Config, SourceConfig
from lcx.data import batch, check_data, heldout_batches
from lcx.data import prepare as prepare_module
from lcx.data.prepare import prepare
from lcx.data.readers import Job, read_job, split_job
from lcx.data.sources import load_corpus
from lcx.data.store import PIECE, ShardWriter
from lcx.errors import UserError
from lcx.files import read_json

TEXTS = [f"document {i} " * (1 + i * i % 50) for i in range(60)]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_of(path, texts=TEXTS):
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def source(path, **fields):
    return SourceConfig(name="mine", path=str(path), **fields)


def config(path, *, length=32, **data):
    fields = {name: data.pop(name) for name in ("options", "format") if name in data}
    return Config.from_dict(
        {
            "data": {"sources": [{"name": "mine", "path": str(path), **fields}], "start_token": None, **data},
            "model": {"vocab_size": 70_000},
            "train": {"batch_size": 4, "sequence_length": length},
        }
    )


def contents(collection):
    lengths = collection.lengths(slice(0, len(collection)))
    tokens, weights = collection.read(np.arange(len(collection)), np.zeros(len(collection), np.int64), lengths)
    borders = np.cumsum(lengths)[:-1]
    if not len(collection):
        return [], []
    return [tuple(one.tolist()) for one in np.split(tokens, borders)], np.split(weights, borders)


def all_texts(path, **data):
    (part,) = load_corpus(config(path, **data).data).parts
    return [bytes(one).decode() for side in (part.train, part.heldout) for one in contents(side)[0]]


def test_prepared_documents_are_the_texts(tmp_path):
    folder = folder_of(tmp_path / "in")
    manifest = prepare(source(folder), tmp_path / "out", job_bytes=5000, workers=1)
    assert len([shard for shard in manifest["shards"] if shard["split"] == "train"]) > 3
    assert sorted(all_texts(tmp_path / "out")) == sorted(TEXTS)
    (part,) = load_corpus(config(tmp_path / "out").data).parts
    assert 0 < len(part.heldout) < 10 and len(part.train) + len(part.heldout) == len(TEXTS)
    assert contents(part.train)[0] == [
        tuple(t.encode()) for t in TEXTS if t.encode() in map(bytes, contents(part.train)[0])
    ]
    assert part.train.name(0) == "train-00000:0"
    first = batch(config(tmp_path / "out"), 3)
    again = prepare(source(folder), tmp_path / "again", job_bytes=5000, workers=2)
    assert again["shards"] == manifest["shards"]
    assert all(np.array_equal(first[name], batch(config(tmp_path / "again"), 3)[name]) for name in first)
    assert sum(float(one["loss_weights"].sum()) for one in heldout_batches(config(tmp_path / "out"))) > 0


def test_spans_of_stored_documents_are_those_in_memory(tmp_path, monkeypatch):
    """Documents of several records, and records with masks; the whole against the parts."""
    monkeypatch.setattr("lcx.data.store.PIECE", 16)
    random = np.random.default_rng(0)
    lengths = [1, 15, 16, 17, 32, 33, 100, 5]
    pieces = [[{"text": "a" * (n // 2), "loss": False}, {"text": ("bcdefghij" * n)[: n - n // 2]}] for n in lengths]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"pieces": piece}) for piece in pieces))
    assert prepare(source(tmp_path / "in.jsonl"), tmp_path / "out", heldout_share=0)["masked"]
    (part,) = load_corpus(config(tmp_path / "out").data).parts
    tokens, weights = contents(part.train)
    assert [bytes(one).decode() for one in tokens] == ["".join(p["text"] for p in piece) for piece in pieces]
    assert [one.tolist() for one in weights] == [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    for _ in range(50):
        which = random.integers(0, 8, 5)
        starts = np.array([random.integers(0, lengths[i]) for i in which])
        counts = np.array([random.integers(1, lengths[i] - start + 1) for i, start in zip(which, starts, strict=True)])
        got_tokens, got_weights = part.train.read(which, starts, counts)
        spans = list(zip(which, starts, counts, strict=True))
        assert got_tokens.tolist() == [t for i, start, count in spans for t in tokens[i][start : start + count]]
        assert got_weights.tolist() == [w for i, start, count in spans for w in weights[i][start : start + count]]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "code"])
def test_all_formats_give_the_same_documents(tmp_path, kind):
    folder = tmp_path / "in"
    if kind in ("parquet", "arrow", "jsonl.zst"):
        pytest.importorskip("zstandard" if kind == "jsonl.zst" else "pyarrow")
    folder.mkdir()
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        import zstandard

        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines[:900]) + zstandard.compress(lines[900:]))
    elif kind == "code":
        (folder / "node_modules").mkdir()
        (folder / "node_modules" / "x.js").write_text("not mine")
        (folder / "image.png").write_bytes(b"\x89PNG\0\0")
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.py").write_text(text)
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        (folder / "README.md").write_text("what it is")
        if kind == "parquet":
            pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)
        else:
            with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
                with pyarrow.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=7)
            (folder / "state.json").write_text("{}")
    fields = {"format": "code"} if kind == "code" else {}
    assert sorted(all_texts(folder, **fields)) == sorted(TEXTS)
    prepare(source(folder, **fields), tmp_path / "out", job_bytes=3000)
    assert sorted(all_texts(tmp_path / "out")) == sorted(TEXTS)


def test_a_file_of_lines_can_be_cut_at_any_byte(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (1, 5, 2)) + '{"text": "last"}')
    mine, size = source(file), file.stat().st_size
    whole = [record.pieces for record in read_job(mine, Job("a.jsonl", file, size))]
    assert len(whole) == 4
    for cut in range(1, size):
        parts = [Job("a.jsonl", file, size, 0, cut), Job("a.jsonl", file, size, cut, size)]
        assert [record.pieces for job in parts for record in read_job(mine, job)] == whole, cut
    assert [job[3:] for job in split_job(Job("a.jsonl", file, 10), "jsonl", 4)] == [(0, 3), (3, 6), (6, 10)]


def test_a_column_of_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "here"}\n')
    assert all_texts(tmp_path / "a.jsonl", options={"column": "content"}) == ["here"]
    with pytest.raises(UserError, match='a record needs a field "text"'):
        load_corpus(config(tmp_path / "a.jsonl").data)
    with pytest.raises(UserError, match='unknown key .*"colum"|unknown key "data.sources "mine" options.colum"'):
        load_corpus(config(tmp_path / "a.jsonl", options={"colum": "content"}).data)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"a.parquet needs pyarrow: pip install 'lcx\[data\]'"):
        load_corpus(config(tmp_path / "a.parquet").data)


def test_damaged_tables_are_one_sentence(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="cannot read .*a.jsonl.gz: .*ended before"):
        load_corpus(config(tmp_path / "a.jsonl.gz").data)
    pytest.importorskip("pyarrow")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="cannot read .*b.parquet: Arrow"):
        load_corpus(config(tmp_path / "b.parquet").data)


def test_token_files(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(1, 60_000, n) for n in (5, 1, 30, 100)]
    ended = np.concatenate([np.append(one, 0) for one in documents])
    begun = np.concatenate([np.append(0, one) for one in documents])
    np.save(tmp_path / "a.npy", ended.astype(np.int64))
    ended.astype("<u2").tofile(tmp_path / "a.bin")
    begun.astype("<u4").tofile(tmp_path / "b.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ended)
    (tmp_path / "c.bin").write_bytes(header.tobytes() + ended.astype("<u2").tobytes())
    tokenizers = pytest.importorskip("tokenizers")
    path = str(tmp_path / "words.json")
    model = tokenizers.models.WordLevel({"zero": 0, "last": 65_000}, unk_token="zero")
    tokenizers.Tokenizer(model).save(path)
    options = {"separator": 0}
    for name, more in (
        ("a.npy", {}),
        ("a.bin", {}),
        ("c.bin", {}),
        ("b.bin", {"dtype": "uint32", "separator_begins": True}),
    ):
        (part,) = load_corpus(config(tmp_path / name, tokenizer=path, options=options | more).data).parts
        expected = [[0, *one.tolist()] if more else [*one.tolist(), 0] for one in documents]
        assert [list(one) for one in contents(part.train)[0]] == expected
    (part,) = load_corpus(config(tmp_path / "a.bin", tokenizer=path).data).parts
    assert len(part.train) == 1 and part.train.total == len(ended)
    many = tmp_path / "many"
    many.mkdir()
    for i in range(3):
        np.save(many / f"{i}.npy", np.tile(ended, 5))
    (part,) = load_corpus(config(many, tokenizer=path, options=options).data).parts
    assert (len(part.train), len(part.heldout)) == (57, 3)
    got = batch(config(many, tokenizer=path, options=options), 0)
    assert got["tokens"].max() > 255 and got["segment_ids"].max() > 1

    with pytest.raises(UserError, match="a.bin holds the token .*, but the tokenizer has 256"):
        load_corpus(config(tmp_path / "a.bin").data)
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="odd.bin is not a file of tokens: its size is no multiple"):
        load_corpus(config(tmp_path / "odd.bin").data)
    (tmp_path / "c.bin").write_bytes((tmp_path / "c.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="its header says 140 tokens and it holds 139"):
        load_corpus(config(tmp_path / "c.bin", tokenizer=path).data)


def shard_of(out, split="train"):
    return next(
        file for file in sorted(out.iterdir()) if file.name.startswith(split) and file.suffix == ".array_record"
    )


def test_damage_is_named_with_its_checksum(tmp_path):
    out = tmp_path / "out"
    prepare(source(folder_of(tmp_path / "in")), out)
    shard = shard_of(out)
    whole = shard.read_bytes()
    stated = read_json(out / "manifest.json")["shards"]
    sha256 = next(one["files"][shard.name]["sha256"] for one in stated if shard.name in one["files"])
    check_data(config(out))
    load_corpus.__globals__["_load"].cache_clear()

    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"the shard {shard} is truncated: .* bytes \\(sha256 {sha256}\\)"):
        check_data(config(out, seed=1))
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(UserError, match=f"the shard {shard} is corrupted: its sha256 is [0-9a-f]+, not {sha256}"):
        check_data(config(out, seed=2))
    shard.unlink()
    with pytest.raises(UserError, match="is missing: prepare the data again"):
        check_data(config(out, seed=3))
    shard.write_bytes(whole)
    check_data(config(out, seed=4))


def test_another_tokenizer_is_refused(tmp_path):
    out = tmp_path / "out"
    prepare(source(folder_of(tmp_path / "in")), out)
    with pytest.raises(UserError, match='was prepared with the tokenizer "bytes" .* not that of the config'):
        check_data(config(out, start_token=256))
    with pytest.raises(UserError, match="there is no prepared data in"):
        check_data(config(tmp_path / "in", format="prepared"))
    prepare(source(tmp_path / "in"), tmp_path / "with_start", start_token=256)
    got = batch(config(tmp_path / "with_start", start_token=256), 0)
    assert np.array_equal(got["tokens"] == 256, got["positions"] == 0)


def write_bad_records(out):
    """A shard that is what its manifest says, with a record that is too short and one with a token that none has."""
    from array_record.python.array_record_module import ArrayRecordWriter

    prepare(source(out.parent / "in"), out, heldout_share=0)
    manifest = json.loads((out / "manifest.json").read_text())
    (shard,) = manifest["shards"]
    records = [text.encode() for text in TEXTS]
    good = dict(enumerate(records))
    records[7] = records[7][:-1]
    writer = ArrayRecordWriter(str(out / f"{shard['name']}.array_record"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    from lcx.data.store import _describe

    shard["files"][f"{shard['name']}.array_record"] = _describe(out / f"{shard['name']}.array_record")
    (out / "manifest.json").write_text(json.dumps(manifest))
    return good


def test_a_bad_record_is_counted_and_replaced(tmp_path, caplog):
    folder_of(tmp_path / "in")
    out = tmp_path / "out"
    good = write_bad_records(out)
    with caplog.at_level(logging.WARNING):
        (part,) = load_corpus(config(out).data).parts
        for _ in range(2):
            tokens, weights = contents(part.train)
            assert all(bytes(one) == good[i] for i, one in enumerate(tokens) if i != 7)
            assert tokens[7] == (0,) * len(good[7]) and not weights[7].any() and weights[6].all()
    assert [record.message.split(" (")[0] for record in caplog.records] == ["document train-00000:7 is bad"]
    stream = [batch(config(out), i) for i in range(20)]
    assert not any(np.any((one["targets"] == 0) & (one["loss_weights"] > 0)) for one in stream)
    assert any(np.any(one["tokens"] == 0) for one in stream)
    (part,) = load_corpus(config(out, max_bad_records=0).data).parts
    with pytest.raises(UserError, match="1 documents cannot be read, the last one train-00000:7 .*max_bad_records=0"):
        contents(part.train)


def test_damage_after_the_check_is_a_bad_record(tmp_path):
    """What the library raises for a changed byte, or for a file that is gone, is not the end of the run."""
    out = tmp_path / "out"
    prepare(source(folder_of(tmp_path / "in")), out, heldout_share=0)
    (part,) = load_corpus(config(out, max_bad_records=1000).data).parts
    shard = shard_of(out)
    whole = bytearray(shard.read_bytes())
    for i in range(1000, 1400):
        whole[i] ^= 255
    shard.write_bytes(whole)
    tokens, _ = contents(part.train)
    assert 0 < sum(not any(one) for one in tokens) <= len(TEXTS)


def test_a_document_longer_than_positions_allow_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lcx.data.store.LONGEST", 300)
    with pytest.raises(UserError, match=r"0\d\d.txt: a document of .* tokens is longer than positions allow \(300\)"):
        prepare(source(folder_of(tmp_path / "in")), tmp_path / "out")


def test_a_killed_run_is_gone_on_with(tmp_path, monkeypatch):
    folder, out = folder_of(tmp_path / "in"), tmp_path / "out"
    expected = prepare(source(folder), tmp_path / "whole", job_bytes=4000)
    done, real = [], prepare_module._do

    def dies(task, masked):
        if len(done) == 3:
            ShardWriter(out, f"train-{task.number:05}", np.uint8, False).write(np.zeros(10, np.uint8), None)
            raise KeyboardInterrupt
        done.append(task.number)
        return real(task, masked)

    monkeypatch.setattr(prepare_module, "_do", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(source(folder), out, job_bytes=4000)
    assert not (out / "manifest.json").exists() and len(done) == 3
    before = {name: (out / f"train-{name:05}.array_record").stat().st_mtime_ns for name in done}

    def counts(task, masked):
        done.append(task.number)
        return real(task, masked)

    monkeypatch.setattr(prepare_module, "_do", counts)
    assert prepare(source(folder), out, job_bytes=4000) == expected
    assert sorted(done) == sorted(set(done))  # none twice
    assert all((out / f"train-{name:05}.array_record").stat().st_mtime_ns == time for name, time in before.items())
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    prepare(source(folder), out, job_bytes=4000)
    with pytest.raises(UserError, match="holds other data: its start_token|holds other data: its tokenizer"):
        prepare(source(folder), out, start_token=256, job_bytes=4000)
    with pytest.raises(UserError, match="is not empty, and holds no prepared data"):
        prepare(source(folder), folder)


def test_the_script_prepares_and_says_how_to_go_on(tmp_path, capsys):
    folder = folder_of(tmp_path / "in")
    assert main(["prepare_data", f"--input={folder}", f"--out={tmp_path / 'out'}", "--workers=1"]) == 0
    printed = capsys.readouterr().out
    assert f"--config.data.sources[0].path={tmp_path / 'out'}" in printed and "train: " in printed
    assert main(["prepare_data", f"--input={tmp_path / 'absent'}", f"--out={tmp_path / 'other'}"]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_leaves_nothing_and_loses_nothing(tmp_path):
    """A real kill of the parent while workers write; then the same command ends it, and no process is left."""
    texts = [os.urandom(300_000).hex() for _ in range(40)]
    folder, out = folder_of(tmp_path / "in", texts), tmp_path / "out"
    command = [sys.executable, "scripts/prepare_data.py", f"--input={folder}", f"--out={out}"]
    command += ["--workers=2", "--shard_megabytes=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LCX_MARK": str(tmp_path)}
    for _ in range(50):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        before = len(list(out.glob("shard-*.json"))) if out.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("shard-*.json"))) >= before + 3:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.002)
        if process.returncode == 0:
            break
        deadline = time.monotonic() + 10
        while (left := marked(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
    assert process.returncode == 0
    expected = prepare(source(folder), tmp_path / "whole", job_bytes=2**20)
    assert read_json(out / "manifest.json")["shards"] == expected["shards"]


def marked(tmp_path):
    """The processes whose environment bears the mark of a test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LCX_MARK={tmp_path}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_pieces_bound_what_is_read():
    assert PIECE * 4 <= 2**20
