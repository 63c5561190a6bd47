"""Where documents come from: the standard library, folders, text files and JSONL; what is trained on, what held out."""

import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcx.config import DataConfig, SourceConfig
from lcx.data.tokenizers import Tokenizer, load_tokenizer
from lcx.errors import UserError, suggest

STANDARD_LIBRARY = "stdlib"
HELDOUT_SHARE = 20
"""One document in this many is held out."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenized documents, end to end. Compares and hashes by identity, so that functions of it can be cached."""

    tokens: np.ndarray
    """All tokens [total]: uint8 for bytes, uint16 or int32 for larger vocabularies."""
    offsets: np.ndarray
    """int64 [documents + 1]: document d is tokens[offsets[d] : offsets[d + 1]], never empty; where there is a start
    token, that and at least one more."""
    names: tuple[str, ...]
    """A path relative to its source, or `path:line` for JSONL."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of all sources, each content once."""

    train: Documents
    heldout: Documents
    fingerprint: str
    """sha256 over the tokenizer and every document's name and content, as hexadecimal digits."""


def load_corpus(data: DataConfig) -> Corpus:
    """Reads and tokenizes the sources; the last few corpora stay in memory.

    A document is held out where the sha256 of its name (its path relative to the source) is divisible by 20. Of
    documents with the same bytes the first is kept, and one for training before one held out. A corpus so small
    that nothing would be left to train on holds nothing out.

    Raises UserError: unknown format or tokenizer, weight other than 1, missing or unreadable file, bad JSONL, nothing
    to train on.
    """
    return _load(data.sources, data.tokenizer, data.start_token)  # nothing else matters here


@functools.lru_cache(maxsize=2)
def _load(sources: tuple[SourceConfig, ...], tokenizer_name: str, start_token: int | None) -> Corpus:
    tokenizer = load_tokenizer(tokenizer_name, start_token)
    train, heldout = [], []
    fingerprint = hashlib.sha256(tokenizer.fingerprint.encode())
    for source in sources:
        for name, content in read_source(source):
            digest = hashlib.sha256(content).digest()
            fingerprint.update(_name_digest(name) + digest)  # of fixed length, so that nothing can shift between them
            (heldout if is_held_out(name) else train).append((name, content, digest))
    if not train:
        train, heldout = heldout, []
    seen = set()
    corpus = Corpus(_tokenize(train, tokenizer, seen), _tokenize(heldout, tokenizer, seen), fingerprint.hexdigest())
    if not len(corpus.train):
        paths = ", ".join(source.path for source in sources) or "no source"
        raise UserError(f"data.sources: the corpus is empty: no document with text in {paths}.")
    return corpus


def is_held_out(name: str) -> bool:
    """Whether the document of this name is never trained on: one name in twenty, whatever else is in the corpus."""
    return int.from_bytes(_name_digest(name)) % HELDOUT_SHARE == 0


def _name_digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _tokenize(records: list[tuple[str, bytes, bytes]], tokenizer: Tokenizer, seen: set[bytes]) -> Documents:
    """Documents of the records whose digest was not seen before; adds theirs to `seen`. Text without tokens is none."""
    added = 0 if tokenizer.start_token is None else 1
    dtype = np.uint8 if tokenizer.vocab_size <= 2**8 else np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    names, pieces = [], []
    for name, content, digest in records:
        if digest in seen:
            continue
        seen.add(digest)
        tokens = tokenizer.encode(content).astype(dtype)
        if tokens.size > added:
            names.append(name)
            pieces.append(tokens)
    offsets = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)
    return Documents(np.concatenate([np.empty(0, dtype), *pieces]), offsets, tuple(names))


def read_source(source: SourceConfig) -> Iterator[tuple[str, bytes]]:
    """Name and content of each document of a source, sorted by file, empty ones left out.

    `path` is "stdlib" (the *.py files of the running Python's standard library), a file, or a folder, all of whose
    files are read but hidden ones. `format` is "text" (a file is a document), "jsonl" (a line is one, in its field
    "text"), or "auto": by each file's suffix. Raises UserError as load_corpus.
    """
    if source.weight != 1:
        raise UserError(f'data.sources "{source.name}": weight {source.weight:g} cannot be used: only 1 is possible.')
    if source.format not in FORMATS and source.format != "auto":
        raise UserError(
            f'data.sources "{source.name}": unknown format "{source.format}": '
            + suggest(source.format, ["auto", *FORMATS])
        )
    for path, file in _files(source):
        kind = source.format
        if kind == "auto":
            kind = "jsonl" if file.suffix == ".jsonl" else "text"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f'data.sources "{source.name}": cannot read {file}: {error.strerror}.') from error
        for name, document in FORMATS[kind](path, content, file):
            if document:
                yield name, document


def _files(source: SourceConfig) -> list[tuple[str, Path]]:
    """(POSIX path relative to the source, file), sorted by that path."""
    if source.path == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        return [item for item in _walk(root, skip={"site-packages"}) if item[0].endswith(".py")]
    path = Path(source.path).expanduser()
    if path.is_dir():
        return [item for item in _walk(path, skip=set()) if not any(part[0] == "." for part in item[0].split("/"))]
    if path.is_file():
        return [(path.name, path)]
    raise UserError(f'data.sources "{source.name}": there is no file or folder {source.path}.')


def _walk(root: Path, skip: set[str]) -> list[tuple[str, Path]]:
    """All regular files under `root`, outside folders named in `skip`, sorted by POSIX path relative to it."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        found += [Path(folder, name) for name in files]
    return sorted((file.relative_to(root).as_posix(), file) for file in found if file.is_file())


def _read_text(name: str, content: bytes, file: Path) -> Iterator[tuple[str, bytes]]:
    yield name, content


def _read_jsonl(name: str, content: bytes, file: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not a JSON object: {error}.") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{file}, line {number}: a record needs a field "text" that holds a string.')
        # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark.
        yield f"{name}:{number}", text.encode(errors="replace")


FORMATS = {"text": _read_text, "jsonl": _read_jsonl}
