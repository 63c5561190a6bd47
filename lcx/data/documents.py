"""Collections of tokenized documents, wherever their tokens lie: all are read by spans of tokens within documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Collection(Protocol):
    """Documents by their numbers, 0 to len - 1. Compares and hashes by identity, so that functions of it are cached."""

    total: int
    """Tokens of all documents together."""

    def __len__(self) -> int: ...

    def lengths(self, documents: np.ndarray | slice) -> np.ndarray:
        """Tokens of each document, int64; never 0."""

    def name(self, document: int) -> str:
        """What people know the document by."""

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [starts[i], starts[i] + counts[i]) of each document named, end to end.

        Returns (tokens, int32 [sum of counts]; the loss weight of each as a target, float32, 0 or 1).
        """


@dataclass(frozen=True, eq=False)
class Documents:
    """A collection in memory, end to end."""

    tokens: np.ndarray
    """All tokens [total]: uint8 for bytes, uint16 or int32 for larger vocabularies; or what gives its slices."""
    offsets: np.ndarray
    """int64 [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]], never empty; where there is a start
    token, that and at least one more."""
    names: Sequence[str]
    """A path relative to its source, or `path:line` for JSONL."""
    scored: np.ndarray | None = None
    """bool [total]: whether a token counts as a target; None: all do."""

    @property
    def total(self) -> int:
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, documents: np.ndarray | slice) -> np.ndarray:
        """See Collection."""
        if isinstance(documents, slice):
            first, last, _ = documents.indices(len(self))
            return np.diff(self.offsets[first : last + 1])
        return self.offsets[documents + 1] - self.offsets[documents]

    def name(self, document: int) -> str:
        """See Collection."""
        return self.names[document]

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Collection."""
        begins = (self.offsets[documents] + starts).tolist()
        slices = [slice(begin, begin + count) for begin, count in zip(begins, counts.tolist(), strict=True)]
        tokens = _gather(self.tokens, slices, np.int32)
        if self.scored is None:
            return tokens, np.ones(tokens.shape, np.float32)
        return tokens, _gather(self.scored, slices, np.float32)


def _gather(array: np.ndarray, slices: list[slice], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, array.dtype), *(array[piece] for piece in slices)]).astype(dtype)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some documents of another collection."""

    inner: Collection
    chosen: np.ndarray
    """int32 or int64 [documents]: their numbers there."""
    total: int

    def __len__(self) -> int:
        return len(self.chosen)

    def lengths(self, documents: np.ndarray | slice) -> np.ndarray:
        """See Collection."""
        return self.inner.lengths(self.chosen[documents])

    def name(self, document: int) -> str:
        """See Collection."""
        return self.inner.name(int(self.chosen[document]))

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Collection."""
        return self.inner.read(self.chosen[documents], starts, counts)


def choose(collection: Collection, chosen: np.ndarray) -> Chosen:
    """The documents of these numbers."""
    return Chosen(collection, chosen, int(collection.lengths(chosen).sum()))


LONGEST = 2**31 - 2**24
"""Tokens of the longest document whose positions can be counted: they are int32, and a row reads on after the last."""
CHUNK = 2**20  # documents whose lengths are looked at at one time


def by_length(collection: Collection, borders: Sequence[int]) -> list[Chosen]:
    """The collection cut by document length: part i holds the documents of borders[i] <= length < borders[i + 1].

    borders: ascending, the first 0; the last part has no upper border. Memory: a number a document.
    """
    dtype = np.int32 if len(collection) < 2**31 else np.int64
    found: list[list[np.ndarray]] = [[] for _ in borders]
    totals = [0] * len(borders)
    for first in range(0, len(collection), CHUNK):
        lengths = collection.lengths(slice(first, first + CHUNK))
        part = np.searchsorted(borders, lengths, side="right") - 1
        for i in range(len(borders)):
            here = np.flatnonzero(part == i)
            found[i].append((first + here).astype(dtype))
            totals[i] += int(lengths[here].sum())
    return [Chosen(collection, np.concatenate(pieces), total) for pieces, total in zip(found, totals, strict=True)]


def longest(collection: Collection) -> tuple[int, int]:
    """The longest document, and its tokens."""
    best = (0, 0)
    for first in range(0, len(collection), CHUNK):
        lengths = collection.lengths(slice(first, first + CHUNK))
        at = int(np.argmax(lengths))
        best = max(best, (first + at, int(lengths[at])), key=lambda found: found[1])
    return best


def to_memory(collection: Collection, most_tokens: int) -> Documents:
    """The first documents of a collection, as many as have `most_tokens` tokens together; at least one if there is.

    What is in memory already is left as it is.
    """
    if isinstance(collection, Documents) and isinstance(collection.tokens, np.ndarray):
        return collection
    lengths = collection.lengths(slice(0, min(len(collection), most_tokens)))  # of documents that are never empty
    count = min(max(1, int(np.searchsorted(np.cumsum(lengths), most_tokens, side="right"))), len(lengths))
    which = np.arange(count)
    tokens, weights = collection.read(which, np.zeros(count, np.int64), lengths[:count])
    offsets = np.concatenate([[0], np.cumsum(lengths[:count])]).astype(np.int64)
    return Documents(tokens, offsets, [collection.name(i) for i in range(count)], weights > 0)


def joined(collections: Sequence[Collection], most_tokens: int = 2**62) -> Documents:
    """Several collections in memory, one after the other, of each at most `most_tokens` tokens."""
    parts = [to_memory(collection, most_tokens) for collection in collections if len(collection)]
    if len(parts) == 1:
        return parts[0]
    tokens = np.concatenate([np.empty(0, np.uint8), *(part.tokens for part in parts)])
    offsets = np.cumsum([0, *np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])])
    scored = None
    if any(part.scored is not None for part in parts):
        whole = [np.ones(part.tokens.shape, bool) if part.scored is None else part.scored for part in parts]
        scored = np.concatenate(whole)
    return Documents(tokens, offsets.astype(np.int64), [name for part in parts for name in part.names], scored)
