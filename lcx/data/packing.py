"""Concatenate and cut, addressed by index: any row of the endless training stream without the rows before it.

The stream is the documents in epoch 0's order, then in epoch 1's, and so on. Row i is cut from tokens
[i * length, (i + 1) * length) and its last target is the token after. Rows are then permuted among those that start in
the same epoch, because consecutive rows of one long document in one batch make its gradient a poor sample.
"""

import functools
from dataclasses import dataclass

import numpy as np

from lcx.data.shuffle import document_order, make_key, permute
from lcx.data.sources import Documents


@dataclass(frozen=True)
class Slots:
    """Documents in the order of one pass over them."""

    order: np.ndarray
    """int64 [documents]: the document in each slot."""
    starts: np.ndarray
    """int64 [documents]: where in the pass each slot begins."""


@functools.lru_cache(maxsize=8)
def epoch_slots(documents: Documents, seed: int, epoch: int) -> Slots:
    """An epoch's order of the documents. O(documents), so the last few are kept."""
    order = document_order(len(documents), seed, epoch)
    lengths = np.diff(documents.offsets)[order]
    return Slots(order, np.cumsum(lengths) - lengths)


def read_slots(documents: Documents, slots: Slots, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at the given places of one pass, and whether each is its document's first: int32 and bool, like places."""
    slot = np.searchsorted(slots.starts, places, side="right") - 1
    depth = places - slots.starts[slot]
    return documents.tokens[documents.offsets[slots.order[slot]] + depth].astype(np.int32), depth == 0


def read_stream(documents: Documents, seed: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same at places of the endless training stream."""
    total = documents.tokens.size
    epochs = places // total
    tokens, first = np.empty(places.shape, np.int32), np.empty(places.shape, bool)
    for epoch in np.unique(epochs).tolist():  # one or two, unless rows are longer than the corpus
        here = epochs == epoch
        tokens[here], first[here] = read_slots(
            documents, epoch_slots(documents, seed, epoch), places[here] - epoch * total
        )
    return tokens, first


def permute_rows(rows: np.ndarray, total: int, length: int, seed: int) -> np.ndarray:
    """Each row's index in the stream, int64 [rows]: a bijection of the rows that start in the same epoch.

    Args: rows, row numbers before the permutation, int64; total, tokens in an epoch; length, tokens in a row.
    """
    epochs = rows * length // total
    permuted = np.empty_like(rows)
    for epoch in np.unique(epochs).tolist():
        first_row, next_first_row = -(-epoch * total // length), -(-(epoch + 1) * total // length)
        here = epochs == epoch
        key = make_key("rows", seed, epoch)
        permuted[here] = first_row + permute(rows[here] - first_row, next_first_row - first_row, key)
    return permuted


def cut_places(rows: np.ndarray, length: int) -> np.ndarray:
    """Places of the tokens of rows of a stream, int64 [rows, length + 1]: neighbours share the token at the cut."""
    return rows[:, None] * length + np.arange(length + 1)


def make_batch(
    tokens: np.ndarray, first: np.ndarray, padding: np.ndarray, row_index: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of a batch from rows with one token more than the batch has.

    Args: tokens, int32 [batch, time + 1]; first, whether a token is its document's first (or the first of the
    padding), bool, same shape; padding, whether it is no token at all, bool, same shape; row_index [batch].

    Returns tokens, targets, segment_ids, positions int32 and loss_weights float32, all [batch, time], and row_index
    int32 [batch] (modulo 2**32). Documents count from 1 in each row, padding is segment 0. Positions restart at each
    document, and at the row's head: a document that was cut goes on as if it began there. The loss weight is 0 where
    the target is a document's first token, or padding.
    """
    time = np.arange(tokens.shape[1] - 1, dtype=np.int32)
    starts = first[:, :-1].copy()
    starts[:, 0] = True
    last_start = np.maximum.accumulate(np.where(starts, time, 0), axis=1)
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "segment_ids": np.where(padding[:, :-1], 0, np.cumsum(starts, axis=1, dtype=np.int32)).astype(np.int32),
        "positions": (time - last_start).astype(np.int32),
        "loss_weights": (~(first | padding)[:, 1:]).astype(np.float32),
        "row_index": row_index.astype(np.int32),
    }
