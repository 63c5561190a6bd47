"""What the data pipeline promises in figures."""

import time
import tracemalloc

import numpy as np
import pytest

from lcx.config import Config, SourceConfig
from lcx.data import load_mixture
from lcx.data.documents import by_length
from lcx.data.packing import make_batch
from lcx.data.prepare import prepare
from lcx.data.rows import EndToEnd
from lcx.data.stream import block_totals


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_best_fit_wastes_under_one_percent_of_the_standard_library():
    train = {"batch_size": 8, "sequence_length": 8192}
    config = Config.from_dict({"data": {"packing": "best_fit"}, "train": train})
    packer = load_mixture(config, 0).datasets[0].packer
    spans, lengths = packer.plan.spans, packer.documents.lengths(slice(0, len(packer.documents)))
    assert int(spans[:, 2].sum()) == int((lengths - 1).sum())  # each token but a document's last is an input once
    assert 1 - int(spans[:, 2].sum()) / (len(packer.plan) * 8192) < 0.01


@pytest.mark.slow
def test_the_standard_library_is_prepared_at_ten_megabytes_a_second(tmp_path):
    prepare(SourceConfig(name="python", path="stdlib"), tmp_path / "warm", job_bytes=2**22)
    start = time.process_time()
    manifest = prepare(SourceConfig(name="python", path="stdlib"), tmp_path / "out", job_bytes=2**22)
    seconds = time.process_time() - start
    megabytes = sum(shard["tokens"] for shard in manifest["shards"]) / 1e6
    print(f"{megabytes:.1f} MB in {seconds:.2f} CPU seconds: {megabytes / seconds:.1f} MB/s a core")
    assert megabytes / seconds > 10


class MadeUp:
    """A hundred million documents of lengths that are made up; their tokens are zeros."""

    def __init__(self, count):
        random = np.random.default_rng(0)
        self._lengths = np.empty(count, np.uint32)
        for first in range(0, count, 2**22):
            here = self._lengths[first : first + 2**22]
            here[:] = np.maximum(1, random.lognormal(6.4, 1.2, len(here)))
        self.total = int(self._lengths.sum(dtype=np.int64))

    def __len__(self):
        return len(self._lengths)

    def lengths(self, documents):
        return self._lengths[documents].astype(np.int64)

    def read(self, documents, starts, counts):
        return np.zeros(int(counts.sum()), np.int32), np.ones(int(counts.sum()), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_a_random_index_of_a_hundred_million_documents_takes_under_ten_milliseconds(rows):
    """In an epoch that was never read from, each time; CPU time, since other tests may run beside this one."""
    documents = MadeUp(10**8)
    block_totals(documents)
    packer, random = EndToEnd(documents, 0, 8192, None), np.random.default_rng(1)
    seconds = []
    for epoch in range(30):
        first = (epoch * documents.total + int(random.integers(documents.total))) // 8192
        numbers = first + np.arange(rows)
        start = time.process_time()
        make_batch(packer.rows(numbers), 8192, numbers)
        seconds.append(time.process_time() - start)
    print(f"{rows} rows: median {np.median(seconds) * 1e3:.1f} ms, longest {max(seconds) * 1e3:.1f} ms")
    assert np.median(seconds) < 0.010


@pytest.mark.slow
def test_a_hundred_million_documents_fit_into_two_gigabytes():
    """What Python and NumPy allocate, at most; other tests of this process have memory of their own."""
    tracemalloc.start()
    try:
        documents = MadeUp(10**8)
        block_totals(documents)
        numbers = np.arange(8)
        make_batch(EndToEnd(documents, 0, 8192, None).rows(numbers), 8192, numbers)
        assert sum(map(len, by_length(documents, [0, 8192]))) == 10**8
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 4 * 10**8 < peak < 2 * 2**30  # the lengths alone are 0.4 GB
