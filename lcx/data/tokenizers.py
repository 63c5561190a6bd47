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
    start_token: int | None
    """What every encoding begins with; None: nothing is added."""
    end_token: int | None
    """What stands for the end of a document where other programs ask for one; lcx itself never writes it."""
    fingerprint: str
    """Changes whenever the same document could give other tokens."""

    def encode(self, document: bytes | str) -> np.ndarray:
        """The tokens of a document, int32 [tokens]: the start token where there is one, and what the text gives."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The document that the tokens spell, as UTF-8 where the tokenizer works on text."""

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as soon as it is certain, piece by piece while the tokens arrive; broken UTF-8 becomes U+FFFD."""


# As tokenizers of published models call the end of a document.
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")

_BYTES = {value: bytes([value]) for value in range(256)}
_NO_BYTE = "\N{REPLACEMENT CHARACTER}".encode()


class ByteTokenizer:
    """A token is a byte: 256 tokens, none of them special, and any document survives the round trip."""

    vocab_size = 256
    start_token = None
    end_token = 255  # a byte that no UTF-8 text holds
    fingerprint = "bytes"

    def reserve(self, token: int) -> None:
        """Raises UserError where the token is a byte, which any document may hold."""
        if token < self.vocab_size:
            raise UserError(
                f"data.start_token={token} is an ordinary byte: with data.tokenizer=bytes use {self.vocab_size}, "
                f"and a model.vocab_size of at least {self.vocab_size + 1}."
            )

    def encode(self, document: bytes | str) -> np.ndarray:
        """See Tokenizer."""
        content = document.encode() if isinstance(document, str) else document
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """See Tokenizer. A number above 255, which a model with a larger vocabulary may write, becomes U+FFFD."""
        return b"".join(_BYTES.get(int(token), _NO_BYTE) for token in tokens)

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

    start_token = None

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
        self._path = path
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # numbers may have gaps
        ends = (self._tokenizer.token_to_id(name) for name in END_TOKENS)
        self.end_token = next((token for token in ends if token is not None), None)
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def reserve(self, token: int) -> None:
        """From here on no text gives the token: text that spells a special token is encoded like any other text.

        Raises UserError for a token of the file that is not a special one.
        """
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return
        added = self._tokenizer.get_added_tokens_decoder()
        if token not in added or not added[token].special:
            raise UserError(
                f'data.start_token={token} is "{name}", an ordinary token of {self._path}: use a special token of that '
                f"file, or {self.vocab_size}, which would be a new one."
            )
        self._tokenizer.encode_special_tokens = True

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


class StartTokenizer:
    """A tokenizer whose encodings, those of prompts too, begin with a start token, which no text is decoded from.

    This is the trained sink of StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.3): a token at the beginning of
    every training sample that attention can always fall back on. An empty document is the start token alone.
    """

    def __init__(self, inner: ByteTokenizer | JsonTokenizer, start_token: int):
        inner.reserve(start_token)
        self._inner = inner
        self.start_token = start_token
        self.end_token = start_token  # the next document's
        self.vocab_size = max(inner.vocab_size, start_token + 1)
        self.fingerprint = f"{inner.fingerprint}, start token {start_token}"

    def encode(self, document: bytes | str) -> np.ndarray:
        """See Tokenizer."""
        return np.concatenate([np.array([self.start_token], np.int32), self._inner.encode(document)])

    def decode(self, tokens: Iterable[int]) -> bytes:
        """See Tokenizer; leaves out start tokens."""
        return self._inner.decode(self._text_tokens(tokens))

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """See Tokenizer; leaves out start tokens."""
        return self._inner.decode_stream(self._text_tokens(tokens))

    def _text_tokens(self, tokens: Iterable[int]) -> Iterator[int]:
        return (token for token in tokens if token != self.start_token)


TOKENIZERS = {"bytes": ByteTokenizer}


@functools.lru_cache(maxsize=4)
def load_tokenizer(name: str, start_token: int | None = None) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a `tokenizers` JSON file.

    start_token: what every encoding is to begin with, a new token or a special one of the file; None: nothing.

    Raises UserError, also for a start token that documents may hold.
    """
    tokenizer = _open(name)
    return tokenizer if start_token is None else StartTokenizer(tokenizer, start_token)


def _open(name: str) -> ByteTokenizer | JsonTokenizer:
    if name.endswith(".json"):
        return JsonTokenizer(Path(name).expanduser())
    if name not in TOKENIZERS:
        known = ", ".join(f'"{known}"' for known in TOKENIZERS)
        raise UserError(
            f'data.tokenizer: unknown tokenizer "{name}": use {known} or the path of a tokenizers .json file.'
        )
    return TOKENIZERS[name]()
