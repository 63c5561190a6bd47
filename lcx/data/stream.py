"""The endless stream of a collection: its documents in epoch 0's order, then in epoch 1's, and so on, found by place.

An epoch's order is two levels of keyed shuffles (lcx.data.shuffle): blocks of about sqrt(n) documents, and documents
within a block. A table over the blocks finds a place's block, a second one over the block's documents its document, so
that any place of a hundred million documents costs milliseconds, in any epoch.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lcx.data.documents import CHUNK, Collection
from lcx.data.shuffle import block_length, block_order, order_within

CHAPTER = 2**12
"""Documents that are put in order at one time, at least, if there are as many: whole blocks."""


class Spans(NamedTuple):
    """Stretches of documents, end to end; int64 [spans] each."""

    documents: np.ndarray
    starts: np.ndarray
    """The first token of the stretch, counted in its document."""
    counts: np.ndarray


@dataclass(frozen=True)
class Slots:
    """Documents end to end."""

    order: np.ndarray
    """int64 [documents]: the document in each slot."""
    borders: np.ndarray
    """int64 [documents + 1]: where each slot begins, and where the last one ends."""

    def spans(self, start: int, stop: int) -> Spans:
        """What lies in the places [start, stop), which the slots hold."""
        low = int(np.searchsorted(self.borders, start, side="right")) - 1
        high = int(np.searchsorted(self.borders, stop, side="left"))
        begins = np.maximum(self.borders[low:high], start)
        ends = np.minimum(self.borders[low + 1 : high + 1], stop)
        return Spans(self.order[low:high], begins - self.borders[low:high], ends - begins)


@dataclass(frozen=True)
class Epoch:
    """The blocks of an epoch in order, and where its chapters begin."""

    blocks: np.ndarray
    sizes: np.ndarray
    """int64 [blocks]: documents in each."""
    blocks_per_chapter: int
    borders: np.ndarray
    """int64 [chapters + 1]: places of the epoch."""


@functools.lru_cache(maxsize=64)
def block_totals(collection: Collection) -> np.ndarray:
    """Tokens in each block of documents, int64 [blocks]. Reads all lengths, some at a time."""
    n = len(collection)
    length = block_length(n)
    step = length * max(1, CHUNK // length)
    totals = []
    for first in range(0, n, step):
        lengths = collection.lengths(slice(first, first + step))
        totals.append(np.add.reduceat(lengths, np.arange(0, len(lengths), length), dtype=np.int64))
    return np.concatenate(totals)


@functools.lru_cache(maxsize=64)
def epoch_table(collection: Collection, seed: int, epoch: int) -> Epoch:
    """The blocks of an epoch: O(sqrt(n))."""
    n = len(collection)
    blocks, sizes = block_order(n, seed, epoch)
    many = max(1, CHAPTER // block_length(n))
    totals = np.add.reduceat(block_totals(collection)[blocks], np.arange(0, len(blocks), many))
    return Epoch(blocks, sizes, many, np.concatenate([[0], np.cumsum(totals)]))


@functools.lru_cache(maxsize=256)
def chapter(collection: Collection, seed: int, epoch: int, number: int) -> Slots:
    """The documents of a chapter of an epoch: O(sqrt(n)), or O(CHAPTER)."""
    table = epoch_table(collection, seed, epoch)
    here = slice(number * table.blocks_per_chapter, (number + 1) * table.blocks_per_chapter)
    order = order_within(table.blocks[here], table.sizes[here], len(collection), seed, epoch)
    ends = np.cumsum(collection.lengths(order))
    return Slots(order, table.borders[number] + np.concatenate([[0], ends]))


def stream_spans(collection: Collection, seed: int, start: int, stop: int) -> Spans:
    """What lies in the places [start, stop) of the endless stream."""
    pieces, place = [], start
    while place < stop:
        epoch, within = divmod(place, collection.total)
        table = epoch_table(collection, seed, epoch)
        number = int(np.searchsorted(table.borders, within, side="right")) - 1
        end = min(stop - epoch * collection.total, int(table.borders[number + 1]))
        pieces.append(chapter(collection, seed, epoch, number).spans(within, end))
        place = epoch * collection.total + end
    return pieces[0] if len(pieces) == 1 else Spans(*(np.concatenate(part) for part in zip(*pieces, strict=True)))
