"""Rows of a training stream, addressed by number: any row without the rows before it.

A packer reads rows by their numbers, as lists of pieces. There is one class a way of packing:

- `EndToEnd`: documents end to end, cut into rows. Row i owns the tokens [i * stride, (i + 1) * stride).
- `BestFit`: documents whole where they fit, several to a row, by a plan.
- `Lanes`: for carried states. Row i is step i // lanes of lane i % lanes, and goes on where the step before ended.

Rows of the first two are permuted among those of an epoch, because consecutive rows of one long document in one batch
make its gradient a poor sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lcx.data.bestfit import Plan
from lcx.data.documents import Collection
from lcx.data.packing import Piece, cut_row, read_piece, row_stride, with_start
from lcx.data.shuffle import make_key, permute
from lcx.data.stream import Spans, stream_spans


class Packer(Protocol):
    """Rows by their numbers."""

    def rows(self, numbers: np.ndarray) -> Sequence[Sequence[Piece]]:
        """The pieces of each row; numbers int64 from 0, without end."""

    def names(self, number: int) -> list[str]:
        """The documents that a row is read from, in order, as people know them."""


@dataclass(frozen=True)
class EndToEnd:
    """See the module's docstring."""

    documents: Collection
    seed: int
    length: int
    start_token: int | None

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """See Packer."""
        stride = row_stride(self.length, self.start_token)
        places = permute_rows(numbers, self.documents.total, stride, self.seed) * stride
        return [[self._row(int(place))] for place in places]

    def names(self, number: int) -> list[str]:
        """See Packer."""
        stride = row_stride(self.length, self.start_token)
        place = int(permute_rows(np.array([number]), self.documents.total, stride, self.seed)[0]) * stride
        return _names(self.documents, self._spans(place).documents)

    def _row(self, place: int) -> Piece:
        return cut_row(read_piece(self.documents, self._spans(place)), self.length, self.start_token)

    def _spans(self, place: int) -> Spans:
        return stream_spans(self.documents, self.seed, place, place + self.length + 1)


def permute_rows(rows: np.ndarray, total: int, stride: int, seed: int) -> np.ndarray:
    """Each row's number in the stream, int64 [rows]: a bijection of the rows that start in the same epoch.

    Args: rows, row numbers before the permutation, int64; total, tokens in an epoch; stride, see row_stride.
    """
    epochs = rows * stride // total
    permuted = np.empty_like(rows)
    for epoch in sorted(set(epochs.tolist())):
        first_row, next_first_row = -(-epoch * total // stride), -(-(epoch + 1) * total // stride)
        here = epochs == epoch
        key = make_key("rows", seed, epoch)
        permuted[here] = first_row + permute(rows[here] - first_row, next_first_row - first_row, key)
    return permuted


@dataclass(frozen=True)
class BestFit:
    """See the module's docstring. The plan is one epoch's; each epoch reads its rows in another order."""

    documents: Collection
    plan: Plan
    seed: int
    start_token: int | None

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """See Packer."""
        return [[self._piece(*span) for span in self.plan.row(int(row))] for row in self._planned(numbers)]

    def names(self, number: int) -> list[str]:
        """See Packer."""
        (row,) = self._planned(np.array([number]))
        return _names(self.documents, [document for document, _, _ in self.plan.row(int(row))])

    def _planned(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of the plan."""
        epochs, within = np.divmod(numbers, len(self.plan))
        keys = {epoch: make_key("rows", self.seed, epoch) for epoch in sorted(set(epochs.tolist()))}
        key = np.array([keys[epoch] for epoch in epochs.tolist()], np.uint64)
        return permute(within, len(self.plan), key) if len(numbers) else within

    def _piece(self, document: int, start: int, count: int) -> Piece:
        spans = Spans(*(np.array([value], np.int64) for value in (document, start, count + 1)))
        piece = read_piece(self.documents, spans)
        return piece if self.start_token is None or start == 0 else with_start(piece, self.start_token)


@dataclass(frozen=True)
class Lanes:
    """See the module's docstring.

    Lane l of n reads the l-th part of n of each epoch's tokens: a document that lies across the border of two parts is
    two documents here. Its positions count up from row to row, and are 0 where it begins or goes on in another lane.
    """

    documents: Collection
    seed: int
    length: int
    lanes: int

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """See Packer."""
        return [self._row(*divmod(int(number), self.lanes)) for number in numbers]

    def names(self, number: int) -> list[str]:
        """See Packer."""
        spans = [spans for spans, _ in self._spans(*divmod(number, self.lanes))]
        return _names(self.documents, np.concatenate([found.documents for found in spans]))

    def _row(self, step: int, lane: int) -> list[Piece]:
        spans = self._spans(step, lane)
        return [
            read_piece(self.documents, found, position=min(int(found.starts[0]), within)) for found, within in spans
        ]

    def _spans(self, step: int, lane: int) -> list[tuple[Spans, int]]:
        """What a row is read from, and how far in its lane each part begins: one for each epoch that it touches."""
        total = self.documents.total
        first, last = lane * total // self.lanes, (lane + 1) * total // self.lanes
        place, end, found = step * self.length, (step + 1) * self.length, []
        while place < end:
            epoch, within = divmod(place, last - first)
            count = min(end - place, last - first - within)
            start = epoch * total + first + within
            found.append((stream_spans(self.documents, self.seed, start, start + count + 1), within))
            place += count
        return found


def _names(documents: Collection, numbers: Sequence[int] | np.ndarray) -> list[str]:
    return [documents.name(int(number)) for number in dict.fromkeys(map(int, numbers))]
