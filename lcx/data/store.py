"""Prepared data: a folder of ArrayRecord shards with the lengths of their documents, vouched for by a manifest.

    manifest.json               tokenizer, dtype, and each shard's documents, tokens, sizes and checksums
    train-00000.array_record    a record is a document's tokens, little-endian; PIECE of them, where there are more
    train-00000.lengths         uint32: tokens of each document
    heldout-00000...            the same for what is never trained on

Where the manifest says `masked`, the tokens of a record are followed by a bit for each: whether it counts in the loss.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcx.config import SourceConfig
from lcx.data.documents import LONGEST
from lcx.data.readers import Record
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError
from lcx.files import cache_folder, is_file_name, read_json, write_json

MANIFEST = "manifest.json"
KIND = "lcx tokens"
PIECE = 2**18
"""Most tokens of a record: what is read of a long document for one row is bounded."""
WRITING = "group_size:1,zstd:1"  # one record at a time can be read
READING = "readahead_buffer_size:0,max_parallelism:0"

log = logging.getLogger(__name__)


def token_dtype(vocab_size: int) -> type:
    """The smallest type that holds all tokens of a vocabulary."""
    return np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32


def encode(record: Record, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray | None]:
    """(the tokens of a document; bool, which of them count, or None for all). None at all where its text gives none."""
    start = 0 if tokenizer.start_token is None else 1
    tokens, scored = [], []
    for text, counts in record.pieces:
        found = tokenizer.encode(text)
        found = found[start:] if tokens else found
        tokens.append(found)
        scored.append(np.full(found.shape, counts))
    joined = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
    if joined.size <= start:
        return joined[:0], None
    return joined, None if all(counts for _, counts in record.pieces) else np.concatenate(scored)


class ShardWriter:
    """Writes one shard; its record for the manifest comes from `close`."""

    def __init__(self, folder: Path, name: str, dtype: type, masked: bool):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._file, self._lengths_file = folder / f"{name}.array_record", folder / f"{name}.lengths"
        self._dtype, self._masked = np.dtype(dtype).newbyteorder("<"), masked
        self._writer = ArrayRecordWriter(os.fspath(self._file), WRITING)
        self._lengths: list[int] = []

    def write(self, tokens: np.ndarray, scored: np.ndarray | None) -> None:
        """Adds a document."""
        if len(tokens) > LONGEST:
            raise UserError(
                f"a document of {len(tokens):,} tokens is longer than positions allow ({LONGEST:,}): cut it."
            )
        for start in range(0, len(tokens), PIECE):
            piece = slice(start, start + PIECE)
            mask = b""
            if self._masked:
                whole = np.ones(len(tokens[piece]), bool) if scored is None else scored[piece]
                mask = np.packbits(whole).tobytes()
            self._writer.write(tokens[piece].astype(self._dtype).tobytes() + mask)
        self._lengths.append(len(tokens))

    def close(self) -> dict[str, Any]:
        """Ends the files. Returns what the manifest says of them; they are on the disk."""
        self._writer.close()
        lengths = np.array(self._lengths, "<u4")
        self._lengths_file.write_bytes(lengths.tobytes())
        files = {path.name: _describe(path) for path in (self._file, self._lengths_file)}
        return {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), "files": files}


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_prepared(path: Path) -> bool:
    """Whether the folder holds prepared data."""
    try:
        return json.loads((path / MANIFEST).read_bytes()).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def load(source: SourceConfig, tokenizer: Tokenizer, max_bad: int) -> tuple["Stored", "Stored", str]:
    """(what is trained on, what is held out, fingerprint) of a folder of prepared data.

    Sizes are compared with the manifest each time, checksums once for each file and time of its last change.

    Raises UserError: no such folder, another tokenizer's tokens, a shard that is missing, cut short or changed.
    """
    folder = Path(source.path).expanduser()
    if not (folder / MANIFEST).exists():
        raise UserError(f'data.sources "{source.name}": there is no prepared data in {source.path} (no {MANIFEST}).')
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != KIND:
        raise UserError(f"{folder / MANIFEST} is not of prepared data.")
    if manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f'data.sources "{source.name}": {folder} was prepared with the tokenizer "{manifest["tokenizer"]["name"]}" '
            f"({manifest['tokenizer']['fingerprint'][:16]}), which is not that of the config "
            f"({tokenizer.fingerprint[:16]}); set data.tokenizer and data.start_token, or prepare the data again."
        )
    verify(folder, manifest)
    fingerprint = hashlib.sha256(json.dumps(manifest["shards"], sort_keys=True).encode()).hexdigest()
    bad = BadRecords(max_bad)
    train, heldout = (Stored(folder, manifest, split, tokenizer.vocab_size, bad) for split in ("train", "heldout"))
    return train, heldout, fingerprint


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError naming the first file that is not what the manifest says."""
    known_file = cache_folder("verified") / f"{hashlib.sha256(os.fspath(folder.resolve()).encode()).hexdigest()}.json"
    try:
        known = read_json(known_file)
    except (OSError, UserError):
        known = {}
    stated = {name: entry for shard in manifest["shards"] for name, entry in shard["files"].items()}
    for name in [*stated, *(shard["name"] for shard in manifest["shards"])]:
        if not is_file_name(name):
            raise UserError(f"{folder / MANIFEST} names {name!r}, which is no file of its folder.")
    wanted, stamps = [], {}
    for name, entry in stated.items():
        try:
            status = (folder / name).stat()
        except OSError:
            raise UserError(f"the shard {folder / name} is missing: prepare the data again.") from None
        if status.st_size != entry["size"]:
            raise UserError(
                f"the shard {folder / name} is truncated: it has {status.st_size:,} of {entry['size']:,} bytes "
                f"(sha256 {entry['sha256']}); copy it again."
            )
        stamps[name] = [entry["sha256"], status.st_size, status.st_mtime_ns]
        if known.get(name) != stamps[name]:
            wanted.append(name)

    def check(name: str) -> None:
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != stated[name]["sha256"]:
            raise UserError(
                f"the shard {folder / name} is corrupted: its sha256 is {found}, not {stated[name]['sha256']}; "
                "copy it again."
            )

    if wanted:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(check, wanted))
        known_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(known_file, stamps)


@dataclass
class BadRecords:
    """Counts the documents of a source that could not be read."""

    most: int
    seen: set[tuple[str, int]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, split: str, document: int, name: str, why: str) -> None:
        """Logs a document once. Raises UserError where there are more than allowed."""
        with self.lock:
            if (split, document) in self.seen:
                return
            self.seen.add((split, document))
            count = len(self.seen)
        log.warning("document %s is bad (%s); it is replaced by tokens 0 without loss (%d so far)", name, why, count)
        if count > self.most:
            raise UserError(
                f"{count} documents cannot be read, the last one {name} ({why}): more than data.max_bad_records="
                f"{self.most}; prepare the data again."
            )


class _Part(NamedTuple):
    """What is wanted of one record."""

    record: int
    document: int
    size: int  # tokens of the record
    here: slice  # of the record's tokens
    there: slice  # where they go


class Stored:
    """A collection in shards. A document that cannot be read has its length, tokens 0, and no weight in the loss."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], split: str, vocab_size: int, bad: BadRecords):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split and shard["documents"]]
        self._files = [folder / f"{shard['name']}.array_record" for shard in shards]
        self._split, self._vocab_size, self._bad = split, vocab_size, bad
        self._dtype, self._masked = np.dtype(manifest["dtype"]), manifest["masked"]
        lengths = [np.fromfile(folder / f"{shard['name']}.lengths", "<u4") for shard in shards]
        for shard, found in zip(shards, lengths, strict=True):
            if len(found) != shard["documents"] or int(found.sum(dtype=np.int64)) != shard["tokens"]:
                raise UserError(f"the lengths of {folder / shard['name']} are not those of the manifest.")
        self._lengths = np.concatenate([np.empty(0, np.uint32), *lengths])
        self._first = np.cumsum([0, *(len(found) for found in lengths)])  # documents before each shard
        # Documents of several records, and how many records more than documents there are before each, by shard.
        self._long = [np.flatnonzero(found > PIECE) for found in lengths]
        self._more = [
            np.cumsum([0, *((found[at] - 1) // PIECE)]) for found, at in zip(lengths, self._long, strict=True)
        ]
        self._readers: dict[tuple[int, int], Any] = {}
        self.total = int(self._lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, documents: np.ndarray | slice) -> np.ndarray:
        """See Collection."""
        return self._lengths[documents].astype(np.int64)

    def name(self, document: int) -> str:
        """See Collection: the shard, and the document's number there."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return f"{self._files[shard].stem}:{document - self._first[shard]}"

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Collection."""
        ends = np.cumsum(counts)
        tokens = np.zeros(int(counts.sum()), np.int32)
        weights = np.ones(tokens.shape, np.float32)
        shards = np.searchsorted(self._first, documents, side="right") - 1
        for shard in sorted(set(shards.tolist())):
            parts = []
            for i in np.flatnonzero(shards == shard).tolist():
                document, start, count = int(documents[i]), int(starts[i]), int(counts[i])
                parts += self._parts(shard, document, start, start + count, int(ends[i]) - count)
            contents = self._contents(shard, [part.record for part in parts])
            for part, content in zip(parts, contents, strict=True):
                found = self._decode(content, part.size)
                if isinstance(found, str):
                    self._bad.add(self._split, part.document, self.name(part.document), found)
                    weights[part.there] = 0
                else:
                    tokens[part.there], weights[part.there] = found[0][part.here], found[1][part.here]
        return tokens, weights

    def _parts(self, shard: int, document: int, start: int, stop: int, place: int) -> list["_Part"]:
        """The records that hold the tokens [start, stop) of a document, which go to `place` and on."""
        within = document - int(self._first[shard])
        first = within + int(self._more[shard][np.searchsorted(self._long[shard], within)])
        length, parts = int(self._lengths[document]), []
        for number in range(start // PIECE, -(-stop // PIECE)):
            base = number * PIECE
            low, high = max(start, base), min(stop, base + PIECE)
            here, there = slice(low - base, high - base), slice(place + low - start, place + high - start)
            parts.append(_Part(first + number, document, min(PIECE, length - base), here, there))
        return parts

    def _contents(self, shard: int, records: list[int]) -> Iterable[bytes | str]:
        """The bytes of records, or what is wrong with one."""
        reader = self._reader(shard)
        if isinstance(reader, str):
            return [reader] * len(records)
        try:
            return reader.read(records)
        except Exception:  # the library raises several kinds; find out which record it is
            return [_read_one(reader, record) for record in records]

    def _reader(self, shard: int) -> Any:
        """A reader of a shard, one for each thread: the library does not say that they can be shared."""
        key = (threading.get_ident(), shard)
        if key not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            if len(self._readers) >= 512:  # each holds an open file
                self._readers.pop(next(iter(self._readers)), None)
            try:
                self._readers[key] = ArrayRecordReader(os.fspath(self._files[shard]), options=READING)
            except Exception as error:
                return f"the shard cannot be opened: {error}".splitlines()[0]
        return self._readers[key]

    def _decode(self, content: bytes | str, size: int) -> tuple[np.ndarray, np.ndarray] | str:
        if isinstance(content, str):
            return content
        mask_bytes = -(-size // 8) if self._masked else 0
        if len(content) != size * self._dtype.itemsize + mask_bytes:
            return f"{len(content)} bytes for {size} tokens"
        tokens = np.frombuffer(content, self._dtype, size)
        if size and int(tokens.max()) >= self._vocab_size:
            return f"token {int(tokens.max())} of a vocabulary of {self._vocab_size}"
        if not self._masked:
            return tokens, np.ones(size, np.float32)
        bits = np.unpackbits(np.frombuffer(content, np.uint8, mask_bytes, size * self._dtype.itemsize), count=size)
        return tokens, bits.astype(np.float32)


def _read_one(reader: Any, record: int) -> bytes | str:
    try:
        return reader.read([record])[0]
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
