"""Rows that a config is tried on: packed documents, padding, and shards of rows and of time that hold nothing."""

from collections.abc import Mapping

import numpy as np

from lcx.config import Config
from lcx.laws.chunk import Chunk, pack
from lcx.laws.subject import Subject


def trial_lengths(time: int) -> list[int]:
    """Parts of a chunk of that many tokens: three that cross shards, and single tokens.

    Two lengths, so that there is little to compile. Not the same backwards: what holds by symmetry alone, as of the
    shards' order around attention, is to show.
    """
    third = (time - 2) // 3
    return [third, 1, third, third] + [1] * (time - 3 * third - 1)


def trial_chunk(subject: Subject, time: int, rows: int, shards: int, seed: int = 0) -> Chunk:
    """A chunk from states that hold tokens.

    One row is a single document that goes on from the state; one goes on with a document, has others behind it and ends
    in padding; one starts with documents of its own. Where rows are cut over several shards the last shard is all
    padding, else a row is.

    Args:
      subject: gives the widths and the dtype.
      time: tokens of a row.
      rows, shards: how many rows there are, and over how many shards they are cut.
      seed: of all values.
    """
    parts = trial_lengths(time)
    # (documents, position of the first token, tokens that the state holds, documents that are padding)
    kinds = [([time], 3, 7, 0), (parts, 5, 4, len(parts) - 3), (parts[::-1], 0, 7, 0), ([time], 0, 2, 1)]
    empty = rows // shards if shards > 1 else rows // len(kinds)
    chosen = [kinds[row % 3] for row in range(rows - empty)] + [kinds[3]] * empty
    documents, first_positions, lengths, padding = zip(*chosen, strict=True)
    return pack(subject, documents, first_positions, lengths, padding, seed)


def trial_batch(config: Config, mesh: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the trainer takes it.

    Rows are one document, or several with padding behind them; in no row has a token of the second shard of time a
    weight, nor in any of the last shard of rows.
    """
    rows, time = config.train.batch_size, config.train.sequence_length
    random = np.random.default_rng(seed)
    tokens = random.integers(0, config.model.vocab_size, (rows, time + 1), np.int32)
    starts, padding = np.zeros((2, rows, time), bool)
    starts[:, 0] = True
    for row in range(rows):
        if row % 3:
            starts[row, random.integers(1, time, 3)] = True
            starts[row, time - time // 4] = padding[row, time - time // 4 :] = True
    last = rows // (mesh["data"] * mesh["fsdp"])
    if last < rows:
        padding[-last:] = True
    time_shard = np.arange(time) // (time // mesh["seq"])
    weights = random.choice([0.0, 0.5, 1.0], (rows, time)) * ~padding * ((time_shard != 1) | (mesh["seq"] == 1))
    index = np.arange(time)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.where(padding, 0, np.cumsum(starts, axis=1)).astype(np.int32),
        "positions": (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32),
        "loss_weights": weights.astype(np.float32),
        "row_index": np.arange(rows, dtype=np.int32),
    }
