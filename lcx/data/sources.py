"""The corpus of a run: what each of its sources is trained on, and what is held out."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcx.config import DataConfig, SourceConfig
from lcx.data import store, synthetic, token_files
from lcx.data.documents import Collection, Documents, joined
from lcx.data.readers import Record, check_format, read_source
from lcx.data.tokenizers import Tokenizer, load_tokenizer
from lcx.errors import UserError

HELDOUT_SHARE = 20
"""One document in this many is held out."""
HELDOUT_TOKENS = 2**25
"""At most about this many held-out tokens of prepared data or token files are scored."""
OTHER_FORMATS = ("prepared", "tokens", "synthetic")


@dataclass(frozen=True, eq=False)
class Part:
    """The documents of one source."""

    name: str
    train: Collection | synthetic.Task
    heldout: Collection
    fingerprint: str
    """sha256 over the tokenizer and every document's name and content, as hexadecimal digits."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of all sources; of those that are read as text, each content once."""

    parts: tuple[Part, ...]
    heldout: Documents
    fingerprint: str
    """Changes with any part's."""

    @property
    def collections(self) -> list[Collection]:
        """What is trained on, but for what is generated."""
        return [part.train for part in self.parts if not isinstance(part.train, synthetic.Task)]


def load_corpus(data: DataConfig) -> Corpus:
    """Reads and tokenizes the sources; the last few corpora stay in memory.

    A document of text is held out where the sha256 of its name (its path relative to the source) is divisible by 20.
    Of documents with the same bytes the first is kept, and one for training before one held out. A source so small
    that nothing would be left to train on holds nothing out. Prepared data is divided already.

    Raises UserError: unknown format or tokenizer, missing, unreadable or damaged file, another tokenizer's data,
    nothing to train on.
    """
    sources = [source.to_dict() for source in data.sources]
    for source in sources:  # what is not read from a source need not be read again for it
        for name in ("weight", "loss_weight", "length_weights"):
            del source[name]
    return _load(json.dumps(sources), data.tokenizer, data.start_token, data.max_bad_records)


@functools.lru_cache(maxsize=2)
def _load(sources_json: str, tokenizer_name: str, start_token: int | None, max_bad: int) -> Corpus:
    tokenizer = load_tokenizer(tokenizer_name, start_token)
    sources = [SourceConfig.from_dict(source) for source in json.loads(sources_json)]
    seen: set[bytes] = set()
    found = [_Text(source, tokenizer) if is_text(source) else source for source in sources]
    for text in found:  # all that is trained on before all that is held out
        if isinstance(text, _Text):
            text.tokenize_train(seen)
    parts = tuple(
        item.part(seen) if isinstance(item, _Text) else _open_part(item, tokenizer, max_bad) for item in found
    )
    for part, source in zip(parts, sources, strict=True):
        if not isinstance(part.train, synthetic.Task) and not len(part.train):
            raise UserError(
                f'data.sources "{part.name}": the corpus is empty: no document with text in {source.path}'
                + (" that another source does not have." if len(parts) > 1 else ".")
            )
    fingerprint = parts[0].fingerprint
    if len(parts) > 1:
        fingerprint = hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Corpus(parts, joined([part.heldout for part in parts], HELDOUT_TOKENS), fingerprint)


def is_text(source: SourceConfig) -> bool:
    """Whether the source holds text that is tokenized when it is read. Raises UserError for an unknown format."""
    check_format(source, OTHER_FORMATS)
    if source.format == "auto":
        path = Path(source.path).expanduser()
        return not (store.is_prepared(path) or token_files.is_token_file(path))
    return source.format not in OTHER_FORMATS


def _open_part(source: SourceConfig, tokenizer: Tokenizer, max_bad: int) -> Part:
    path = Path(source.path).expanduser()
    if source.format == "synthetic":
        task = synthetic.make_task(source, tokenizer)
        return Part(source.name, task, task.heldout(), task.fingerprint)
    if source.format == "tokens" or token_files.is_token_file(path):
        return Part(source.name, *token_files.load(source, tokenizer, HELDOUT_SHARE))
    return Part(source.name, *store.load(source, tokenizer, max_bad))


class _Text:
    """A source of text while it is being read."""

    def __init__(self, source: SourceConfig, tokenizer: Tokenizer):
        self.source, self.tokenizer = source, tokenizer
        records: dict[bool, list[tuple[Record, bytes]]] = {False: [], True: []}
        fingerprint = hashlib.sha256(tokenizer.fingerprint.encode())
        for record in read_source(source):
            digest = record.digest()
            fingerprint.update(_name_digest(record.name) + digest)  # of fixed length: nothing can shift between them
            records[is_held_out(record.name)].append((record, digest))
        self.fingerprint = fingerprint.hexdigest()
        self.train_records, self.heldout_records = records[False], records[True]
        if not self.train_records:
            self.train_records, self.heldout_records = self.heldout_records, []
        self.train: Documents | None = None

    def tokenize_train(self, seen: set[bytes]) -> None:
        self.train = _tokenize(self.train_records, self.tokenizer, seen)

    def part(self, seen: set[bytes]) -> Part:
        heldout = _tokenize(self.heldout_records, self.tokenizer, seen)
        return Part(self.source.name, self.train, heldout, self.fingerprint)


def is_held_out(name: str) -> bool:
    """Whether the document of this name is never trained on: one name in twenty, whatever else is in the corpus."""
    return int.from_bytes(_name_digest(name)) % HELDOUT_SHARE == 0


def _name_digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _tokenize(records: Sequence[tuple[Record, bytes]], tokenizer: Tokenizer, seen: set[bytes]) -> Documents:
    """Documents of the records whose digest was not seen before; adds theirs to `seen`. Text without tokens is none."""
    dtype = store.token_dtype(tokenizer.vocab_size)
    names, pieces, masks = [], [], []
    for record, digest in records:
        if digest in seen:
            continue
        seen.add(digest)
        tokens, scored = store.encode(record, tokenizer)
        if tokens.size:
            names.append(record.name)
            pieces.append(tokens.astype(dtype))
            masks.append(scored)
    offsets = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)
    mask = None
    if any(scored is not None for scored in masks):
        whole = zip(pieces, masks, strict=True)
        mask = np.concatenate([np.ones(len(tokens), bool) if scored is None else scored for tokens, scored in whole])
    return Documents(np.concatenate([np.empty(0, dtype), *pieces]), offsets, tuple(names), mask)
