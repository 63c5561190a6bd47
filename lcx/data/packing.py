"""Concatenate and cut, addressed by index: any row of the endless training stream without the rows before it.

The stream is the documents in epoch 0's order, then in epoch 1's, and so on. Row i owns the stride's tokens
[i * stride, (i + 1) * stride) and predicts, from them, the token after each: its last target is the next row's first
token. Rows are then permuted among those that start in the same epoch, because consecutive rows of one long document in
one batch make its gradient a poor sample.

Without a start token the stride is the row's length. With one, every document of the stream begins with it, and so does
every row: a row that goes on with a document has the start token in front of its own tokens, so the stride is one less
than its length. A row whose own first token is a start token has a place left over at its end. Both ways one target of
the row is another row's, and has weight 0: the token after the inserted one, or the last.
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


def row_stride(length: int, start_token: int | None) -> int:
    """How many tokens of the stream a row of `length` tokens owns."""
    return length if start_token is None else length - 1


def permute_rows(rows: np.ndarray, total: int, stride: int, seed: int) -> np.ndarray:
    """Each row's index in the stream, int64 [rows]: a bijection of the rows that start in the same epoch.

    Args: rows, row numbers before the permutation, int64; total, tokens in an epoch; stride, see row_stride.
    """
    epochs = rows * stride // total
    permuted = np.empty_like(rows)
    for epoch in np.unique(epochs).tolist():
        first_row, next_first_row = -(-epoch * total // stride), -(-(epoch + 1) * total // stride)
        here = epochs == epoch
        key = make_key("rows", seed, epoch)
        permuted[here] = first_row + permute(rows[here] - first_row, next_first_row - first_row, key)
    return permuted


def cut_places(rows: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Places of the tokens of rows of a stream, int64 [rows, length + 1], from each row's first own token on."""
    return rows[:, None] * stride + np.arange(length + 1)


def make_batch(
    tokens: np.ndarray,
    first: np.ndarray,
    padding: np.ndarray,
    row_index: np.ndarray,
    start_token: int | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of a batch from rows with one token more than the batch has.

    Args: tokens, int32 [batch, time + 1], from each row's first own token on; first, whether a token is its document's
    first (or the first of the padding), bool, same shape; padding, whether it is no token at all, bool, same shape;
    row_index [batch]; start_token, what every document begins with, if anything.

    Returns tokens, targets, segment_ids, positions int32 and loss_weights float32, all [batch, time], and row_index
    int32 [batch] (modulo 2**32). Documents count from 1 in each row, padding is segment 0. Positions restart at each
    document, and at the row's head: a document that was cut goes on as if it began there, with the start token if there
    is one. The loss weight is 0 where the target is a document's first token, padding, or another row's target.
    """
    scored = ~(first | padding)
    if start_token is not None:
        cut = ~(first | padding)[:, 0]
        scored[:, [0, -1]] = False  # the targets of the row before and of the row after
        tokens = _put_in_front(start_token, tokens, cut)
        first = _put_in_front(True, first, cut)
        padding, scored = (_put_in_front(False, array, cut) for array in (padding, scored))
    time = np.arange(tokens.shape[1] - 1, dtype=np.int32)
    starts = first[:, :-1].copy()
    starts[:, 0] = True
    last_start = np.maximum.accumulate(np.where(starts, time, 0), axis=1)
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "segment_ids": np.where(padding[:, :-1], 0, np.cumsum(starts, axis=1, dtype=np.int32)).astype(np.int32),
        "positions": (time - last_start).astype(np.int32),
        "loss_weights": scored[:, 1:].astype(np.float32),
        "row_index": row_index.astype(np.int32),
    }


def _put_in_front(value: int | bool, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The array [batch, time] with the value before the marked rows, bool [batch], which lose their last element."""
    moved = np.roll(array, 1, axis=1)
    moved[:, 0] = value
    return np.where(rows[:, None], moved, array)
