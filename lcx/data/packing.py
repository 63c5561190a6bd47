"""From stretches of documents to the arrays of a batch.

A row is made of pieces: consecutive tokens of a stream or of a document, with one token more than they take in the row,
since each token predicts the one after it. A piece begins a segment, and so does each document's first token in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lcx.data.documents import Collection
from lcx.data.stream import Spans


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens, n + 1 of them, that take n places of a row."""

    tokens: np.ndarray
    """int32 [n + 1]."""
    weights: np.ndarray
    """float32 [n + 1]: the loss weight of each as a target; the first one's is not used."""
    first: np.ndarray
    """bool [n + 1]: whether it is its document's first."""
    position: int = 0
    """Of the first token in its document; 0 also where a cut document goes on as if it began here."""


def read_piece(collection: Collection, spans: Spans, position: int = 0) -> Piece:
    """The tokens of the spans; a document's first token is not a target."""
    tokens, weights = collection.read(*spans)
    first = np.zeros(tokens.shape, bool)
    first[(np.cumsum(spans.counts) - spans.counts)[spans.starts == 0]] = True
    return Piece(tokens, np.where(first, np.float32(0), weights), first, position)


def with_start(piece: Piece, start_token: int) -> Piece:
    """The piece with the start token in front of it. It does not predict the piece's own first token: another piece
    has that target."""
    nothing = np.zeros(1, np.float32)
    return Piece(
        np.concatenate([np.array([start_token], np.int32), piece.tokens]),
        np.concatenate([nothing, nothing, piece.weights[1:]]),
        np.concatenate([[True], piece.first]),
    )


def last_of_all(piece: Piece) -> Piece:
    """The piece with a target of weight 0 after its last token, for tokens that nothing follows."""
    zero = np.zeros(1, np.int32)
    return Piece(
        np.concatenate([piece.tokens, zero]),
        np.concatenate([piece.weights, zero.astype(np.float32)]),
        np.concatenate([piece.first, [False]]),
        piece.position,
    )


def row_stride(length: int, start_token: int | None) -> int:
    """How many tokens of the stream a row of `length` tokens owns, where documents are end to end."""
    return length if start_token is None else length - 1


def cut_row(piece: Piece, length: int, start_token: int | None) -> Piece:
    """The piece of a row that is cut from a stream of documents end to end.

    Without a start token the row owns `length` tokens, and its last target is the next row's first token. With one,
    every document begins with it, and so does every row: a row that goes on with a document has it in front of its own
    tokens, which are one fewer. A row whose own first token is a start token has a place left over at its end. Both
    ways one target of the row is another row's, and has weight 0: the token after the inserted one, or the last.

    piece: length + 1 tokens from the row's first own token on, or what there is.
    """
    if start_token is None:
        return piece
    if not piece.first[0]:
        longer = with_start(piece, start_token)
        return Piece(longer.tokens[: length + 1], longer.weights[: length + 1], longer.first[: length + 1])
    weights = piece.weights.copy()
    weights[length:] = 0
    return Piece(piece.tokens, weights, piece.first)


def make_batch(rows: Sequence[Sequence[Piece]], length: int, row_index: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a batch from the pieces of each row, which take at most `length` places; the rest is padding.

    Returns tokens, targets, segment_ids, positions int32 and loss_weights float32, all [batch, time], and row_index
    int32 [batch] (modulo 2**32). Documents count from 1 in each row, padding is segment 0. Positions restart at each
    document and at each piece, unless the row's first piece has a position of its own.
    """
    shape = (len(rows), length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights, starts, used = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
    carried = np.zeros((len(rows), 1), np.int32)
    for row, pieces in enumerate(rows):
        place = 0
        for piece in pieces:
            here = (row, slice(place, place + len(piece.tokens) - 1))
            tokens[here], targets[here], weights[here] = piece.tokens[:-1], piece.tokens[1:], piece.weights[1:]
            starts[here], used[here] = piece.first[:-1], True
            if piece.position and place == 0:
                carried[row] = piece.position
            else:
                starts[row, place] = True
            place = here[1].stop
        starts[row, place : place + 1] = True  # of the padding
    time = np.arange(length, dtype=np.int32)
    last_start = np.maximum.accumulate(np.where(starts, time, -carried), axis=1)
    segments = np.cumsum(starts, axis=1, dtype=np.int32) + (carried > 0)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.where(used, segments, 0).astype(np.int32),
        "positions": (time - last_start).astype(np.int32),
        "loss_weights": weights,
        "row_index": row_index.astype(np.int32),
    }
