"""Which documents a batch is read from: told without reading it."""

import numpy as np
import pytest

from lcx.config import Config
from lcx.data import batch, documents_of


@pytest.mark.parametrize("mode", ["concatenate", "best_fit", "carried", "start"])
def test_the_documents_of_a_batch_are_those_whose_bytes_it_holds(tmp_path, monkeypatch, mode):
    """Document 17 is some bytes of value 17. A row's last target may be the next document's first byte."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for number in range(100):
        (tmp_path / "corpus" / f"{number}").write_bytes(bytes([number]) * (3 + number * 7 % 40))
    data = {"sources": [{"name": "numbers", "path": str(tmp_path / "corpus")}]}
    data |= {"packing": "best_fit"} if mode == "best_fit" else {"start_token": 256} if mode == "start" else {}
    train = {"batch_size": 6, "sequence_length": 24, "carry_state": mode == "carried"}
    config = Config.from_dict({"data": data, "train": train, "model": {"vocab_size": 257}})
    for index in (0, 3, 40):  # the last one of another epoch
        made, told = batch(config, index), documents_of(config, index)
        assert len(told) == 6
        for row, record in enumerate(told):
            assert record["source"] == "numbers"
            here = made["segment_ids"][row] > 0
            inputs, targets = (set(made[name][row][here].tolist()) - {256} for name in ("tokens", "targets"))
            named = {int(name) for name in record["documents"]}
            assert inputs <= named <= inputs | targets | ({int(record["documents"][-1])} if mode == "start" else set())


def test_examples_of_a_task_are_named_by_their_numbers(tmp_path):
    task = {"name": "t", "path": "associative_recall", "format": "synthetic"}
    sources = [task | {"options": {"length": 32, "pairs": 4, "queries": 4}}]
    train = {"batch_size": 2, "sequence_length": 64}
    told = documents_of(Config.from_dict({"data": {"sources": sources}, "train": train}), 1)
    names = [name for record in told for name in record["documents"]]
    assert len(names) == 4 and all(name.startswith("associative_recall:") for name in names)
    assert len(set(names)) == len(names) and np.all([name.split(":")[1].isdigit() for name in names])
