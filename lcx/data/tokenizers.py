"""Tokenizers: bytes between a document and its integer tokens."""

import codecs
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from lcx.errors import UserError


class Tokenizer(Protocol):
    """What the rest of lcx asks of a tokenizer."""

    vocab_size: int
    fingerprint: str
    """Changes whenever the same document could give other tokens."""

    def encode(self, document: bytes | str) -> np.ndarray:
        """The tokens of a document, int32 [tokens]; no special tokens are added."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The document that the tokens spell, as UTF-8 where the tokenizer works on text."""

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as soon as it is certain, piece by piece while the tokens arrive; broken UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """A token is a byte: 256 tokens, none of them special, and any document survives the round trip."""

    vocab_size = 256
    fingerprint = "bytes"

    def encode(self, document: bytes | str) -> np.ndarray:
        """See Tokenizer."""
        content = document.encode() if isinstance(document, str) else document
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """See Tokenizer. Raises ValueError for a token outside 0..255."""
        return bytes(int(token) for token in tokens)

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """See Tokenizer."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if text := decoder.decode(self.decode([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class JsonTokenizer:
    """A JSON file of the `tokenizers` library. Bytes that are not UTF-8 become U+FFFD before they are encoded."""

    def __init__(self, path: Path):
        # Imported here: a run on bytes needs neither the library nor the time to load it.
        import tokenizers

        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except OSError as error:
            raise UserError(f"data.tokenizer: cannot read {path}: {error.strerror}.") from error
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"data.tokenizer: {path} is not a JSON file of the tokenizers library: {error}.") from error
        self._tokenizer.no_truncation()  # a file saved with either would cut documents short or lengthen them
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # numbers may have gaps
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, document: bytes | str) -> np.ndarray:
        """See Tokenizer."""
        text = document.decode(errors="replace") if isinstance(document, bytes) else document
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """See Tokenizer."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False).encode()

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """See Tokenizer. A character that the tokens leave unfinished at the end is dropped."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for token in tokens:
            if text := stream.step(self._tokenizer, int(token)):
                yield text


TOKENIZERS = {"bytes": ByteTokenizer}


@functools.lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a `tokenizers` JSON file. Raises UserError."""
    if name.endswith(".json"):
        return JsonTokenizer(Path(name).expanduser())
    if name not in TOKENIZERS:
        known = ", ".join(f'"{known}"' for known in TOKENIZERS)
        raise UserError(
            f'data.tokenizer: unknown tokenizer "{name}": use {known} or the path of a tokenizers .json file.'
        )
    return TOKENIZERS[name]()
