"""Reading in processes: the same stream, and no process that outlives its parent."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lcx.config import Config
from lcx.data import batch, read_ahead
from lcx.errors import UserError


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def everything_on(tmp_path, batch_size=8, **data):
    """Mixing, best-fit, upsampling, masks, synthetic tasks and stages, all at once."""
    sources = []
    for name, letters in (("a", b"abcdef"), ("b", b"012345")):
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            for i in range(40):
                content = bytes(letters[(i * j + j) % 6] for j in range(3 + i * i % 97)) + name.encode() + bytes([i])
                (folder / f"{i:03}").write_bytes(content)
        sources.append({"name": name, "path": str(folder), "weight": 3 if name == "a" else 1})
    sources[0]["length_weights"] = {"40": 3}
    sources[1]["loss_weight"] = 0.5
    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(json.dumps({"prompt": "ask " * i, "completion": "say " * i}) for i in range(1, 20)))
    sources.append({"name": "chat", "path": str(chat), "weight": 0.5})
    options = {"length": 32, "pairs": 4, "queries": 4}
    sources.append({"name": "recall", "path": "associative_recall", "format": "synthetic", "options": options})
    stages = [{"step": 300, "sequence_length": 64, "batch_size": 4}, {"step": 600, "weights": {"a": 1, "recall": 2}}]
    train = {"batch_size": batch_size, "sequence_length": 32, "stages": stages}
    return Config.from_dict({"data": {"sources": sources, "packing": "best_fit", **data}, "train": train})


def add(hasher, one):
    for name, array in sorted(one.items()):
        hasher.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())


def stream_hash(pairs):
    hasher = hashlib.sha256()
    for _, one in pairs:
        add(hasher, one)
    return hasher.hexdigest()


@pytest.mark.parametrize("first, count", [(294, 12), pytest.param(0, 1000, marks=pytest.mark.slow)])
def test_the_stream_is_the_same_for_all_readers_and_workers(tmp_path, first, count):
    """With all features on, over a border of stages, or both and a thousand indices."""
    config = everything_on(tmp_path)
    indices = range(first, first + count)
    expected = stream_hash((i, batch(config, i)) for i in indices)
    for readers in (2, 4, 8):
        hasher = hashlib.sha256()
        for index in indices:
            rows = 4 if 300 <= index < 600 else 8
            shares = [range(r, rows, readers) for r in range(readers)]
            parts = [batch(config, index, share) for share in shares]
            order = np.argsort([row for share in shares for row in share])
            add(hasher, {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]})
        assert hasher.hexdigest() == expected, readers
    for workers in ({"workers": 0}, {"workers": 2}, {"workers": 4}, {"worker_processes": 2}, {"worker_processes": 4}):
        if count < 1000 and workers == {"worker_processes": 4}:
            continue
        reader = read_ahead(everything_on(tmp_path, **workers), first)
        assert stream_hash(itertools.islice(reader, count)) == expected, workers
        reader.close()
        assert not multiprocessing.active_children()
    for start in (1, 299, 300, 777) if count == 1000 else ():
        reader = read_ahead(everything_on(tmp_path, worker_processes=2, workers=0), start)
        pairs = list(itertools.islice(reader, 20))
        reader.close()
        assert [index for index, _ in pairs] == list(range(start, start + 20))
        assert stream_hash(pairs) == stream_hash((i, batch(config, i)) for i in range(start, start + 20))


def test_the_stream_with_everything_on_never_changes(tmp_path):
    config = everything_on(tmp_path)
    hasher = hashlib.sha256()
    for index in [*range(20), *range(295, 305), *range(600, 620), 10**6]:
        add(hasher, batch(config, index))
    assert hasher.hexdigest() == "c68aab17ed53ac460705911d2ecff9422cd4b087e2330b28ebf0dc3eaba55e2a"


def test_a_workers_error_is_the_readers(tmp_path):
    config = everything_on(tmp_path, worker_processes=1)
    bad = Config.from_dict(config.to_dict() | {"model": {"vocab_size": 2}})
    with pytest.raises(UserError, match="vocab_size"):
        read_ahead(bad, 0)
    reader = read_ahead(config, 0)
    next(reader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the worker process of batch . ended with code -9"):
        list(itertools.islice(reader, 10))
    assert not multiprocessing.active_children()


def marked(mark):
    """The processes whose environment bears a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LCX_MARK={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


PROGRAM = """
import json, sys
from lcx.data import read_ahead
for index, _ in read_ahead(json.loads(sys.argv[1]), 0):
    print(index, flush=True)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_no_worker_outlives_a_killed_parent(tmp_path, kills):
    """Killed at any moment, while workers start, too; nothing stays in shared memory either."""
    config = everything_on(tmp_path, worker_processes=2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LCX_MARK": str(tmp_path)}
    shared = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").exists() else set()
    for kill in range(kills):
        command = [sys.executable, "-c", PROGRAM, json.dumps(config.to_dict())]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        if kill % 4 < 3:
            for _ in range(1 + 7 * kill):
                process.stdout.readline()
            assert len(marked(tmp_path)) >= 3  # itself and its workers
        else:
            time.sleep(0.1 * kill)
        process.kill()
        process.wait()
        process.stdout.close()
        deadline = time.monotonic() + 20
        while (left := marked(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left
    if shared:
        assert not {
            path for path in set(Path("/dev/shm").iterdir()) - shared if path.owner() == Path("~").expanduser().owner()
        }
