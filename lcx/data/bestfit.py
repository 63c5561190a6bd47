"""Best-fit packing: documents whole where a row holds them, several to a row, with next to no padding.

Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), section 2: a document longer than a row
is cut into rows. What is left of it goes, like every shorter document, into the row with the least room that holds it,
longest first. A document of n tokens takes n - 1 places, since its last token predicts nothing.

The plan of a whole epoch lies in two files that are mapped into memory. It is made once, a group of blocks of documents
at a time, and found again by a key of all that it depends on.
"""

import bisect
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcx.data.documents import Collection
from lcx.data.shuffle import block_order, order_within
from lcx.files import cache_folder

GROUP_ROWS, GROUP_DOCUMENTS = 1024, 2**14
"""A group holds at least this many rows' worth of tokens and this many documents, if there are as many."""


@dataclass(frozen=True)
class Plan:
    """The rows of an epoch."""

    borders: np.ndarray
    """int64 [rows + 1]: the spans of row r are spans[borders[r] : borders[r + 1]]."""
    spans: np.ndarray
    """int64 [spans, 3]: the document, its first token in the row, and how many of its tokens are inputs."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    def row(self, row: int) -> list[list[int]]:
        """The (document, start, count) of each span."""
        return self.spans[self.borders[row] : self.borders[row + 1]].tolist()


def load_plan(collection: Collection, fingerprint: str, length: int, seed: int, start_token: int | None) -> Plan:
    """The plan of a collection, made if it is not there.

    Args:
      collection: what is packed.
      fingerprint: hexadecimal digits that change with the collection.
      length: tokens a row.
      seed: of the order in which documents form groups.
      start_token: what a row begins with where it goes on with a document.
    """
    overhead = 0 if start_token is None else 1
    folder = cache_folder("plans") / f"{fingerprint[:32]}-{length}-{seed}-{overhead}"
    if not (folder / "done.json").exists():
        _build(collection, length, seed, overhead, folder)
    return Plan(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("borders", "spans")))


def _build(collection: Collection, length: int, seed: int, overhead: int, folder: Path) -> None:
    """Writes beside the folder, then renames: another process may be doing the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        rows = count = 0
        with open(temporary / "borders.raw", "wb") as borders, open(temporary / "spans.raw", "wb") as spans:
            borders.write(np.zeros(1, np.int64).tobytes())
            for documents in _groups(collection, length, seed):
                ends, packed = pack(documents, collection.lengths(documents), length, overhead)
                borders.write((count + ends).tobytes())
                spans.write(packed.tobytes())
                rows, count = rows + len(ends), count + len(packed)
        _to_npy(temporary / "borders.raw", (rows + 1,))
        _to_npy(temporary / "spans.raw", (count, 3))
        (temporary / "done.json").write_text(json.dumps({"rows": rows, "spans": count}))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "done.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_npy(raw: Path, shape: tuple[int, ...]) -> None:
    with open(raw, "rb") as source, open(raw.with_suffix(".npy"), "wb") as target:
        header = {"descr": np.dtype(np.int64).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(target, header)
        shutil.copyfileobj(source, target)
    raw.unlink()


def _groups(collection: Collection, length: int, seed: int):
    """The documents of each group, int64, in the order of epoch 0. One that would be too small joins its neighbour."""
    n, remaining = len(collection), collection.total
    blocks, sizes = block_order(n, seed, 0)
    waiting, tokens, count = [], 0, 0
    for i in range(len(blocks)):
        documents = order_within(blocks[i : i + 1], sizes[i : i + 1], n, seed, 0)
        found = int(collection.lengths(documents).sum())
        waiting, tokens, count = [*waiting, documents], tokens + found, count + len(documents)
        remaining -= found
        if tokens >= GROUP_ROWS * length and count >= GROUP_DOCUMENTS and remaining >= GROUP_ROWS * length:
            yield np.concatenate(waiting)
            waiting, tokens, count = [], 0, 0
    yield np.concatenate(waiting)


def pack(documents: np.ndarray, lengths: np.ndarray, length: int, overhead: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents into rows of `length` places.

    Args: documents, their numbers, int64 [n]; lengths, their tokens; overhead, places that a stretch takes besides
    where it goes on with a document.

    Returns the end of each row among the spans, int64 [rows], and the spans as Plan has them.
    """
    inputs = lengths - 1
    pieces = np.where(inputs > length, -(-(inputs - overhead) // (length - overhead)), (inputs > 0).astype(np.int64))
    which = np.repeat(np.arange(len(documents)), pieces)
    number = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.where(number == 0, 0, number * (length - overhead) + overhead)
    stops = np.minimum(inputs[which], (number + 1) * (length - overhead) + overhead)
    counts = stops - starts
    sizes = counts + np.where(number > 0, overhead, 0)
    spans = np.stack([documents[which], starts, counts], axis=1).astype(np.int64)
    whole = np.flatnonzero(sizes == length)
    rows = [[i] for i in whole.tolist()]
    rows += best_fit(np.flatnonzero(sizes < length), sizes, length)
    order = np.array([i for row in rows for i in row], np.int64)
    return np.cumsum([len(row) for row in rows], dtype=np.int64), spans[order]


def best_fit(items: np.ndarray, sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """The items of each bin, longest first: each goes where the least room is left that holds it."""
    rooms: list[tuple[int, int]] = []  # (room left, bin) of the bins that have any, sorted
    bins: list[list[int]] = []
    for item in items[np.argsort(-sizes[items], kind="stable")].tolist():
        size = int(sizes[item])
        at = bisect.bisect_left(rooms, (size, 0))
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(at)
        bins[number].append(item)
        if room > size:
            bisect.insort(rooms, (room - size, number))
    return bins
