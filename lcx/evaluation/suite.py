"""What a suite is: a question to a model, answered in numbers and pictures.

A suite is a module, or anything else, with two names:

    Options                            a frozen dataclass of what a config may set, `evaluation.options.<suite>`
    run(model, options, material)      yields (name, value): a number, or what a picture shows

It knows nothing of workdirs, meshes or steps, so that one and the same runs inside training on sharded parameters and
afterwards on a checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from lcx.errors import UserError
from lcx.models import LanguageModel


@dataclass(frozen=True)
class Grid:
    """A heat map: one number for each row and column."""

    kind: ClassVar[str] = "grid"
    rows: Sequence[Any]  # labels
    columns: Sequence[Any]
    values: Sequence[Sequence[float | None]]  # by row, then column; None: there is none
    row_name: str = ""
    column_name: str = ""
    value_name: str = ""
    limits: tuple[float, float] | None = (0.0, 1.0)  # of the colours; None: the values'


@dataclass(frozen=True)
class Curves:
    """Lines over one axis."""

    kind: ClassVar[str] = "curves"
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]  # by name, a number for each x
    x_name: str = ""
    y_name: str = ""
    log_x: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)  # upright lines: name to x


Picture = Grid | Curves
Finding = tuple[str, float | Picture]


class Tokenizer(Protocol):
    """What a suite asks of a tokenizer."""

    start_token: int | None

    def encode(self, document: bytes | str) -> np.ndarray: ...

    def decode(self, tokens: Iterable[int]) -> bytes: ...


class Example(Protocol):
    """One problem of a synthetic task with its answers."""

    tokens: np.ndarray  # int32 [length]
    answers: np.ndarray  # int32 [length]: the number of the answer that a token belongs to, from 1; 0: the problem


@dataclass(frozen=True)
class Material:
    """What suites are made of, and how much of it is read at once."""

    tokenizer: Tokenizer
    train_length: int  # tokens of a row in training
    # (files: a file or folder of text; "": what the run holds out) -> documents, int32 [tokens] each
    documents: Callable[[str], list[np.ndarray]]
    # (task, its options, how many) -> held-out examples
    examples: Callable[[str, Mapping[str, Any], int], list[Example]]
    # (example, what is predicted at each place) -> (answers that are wholly right, answers)
    score: Callable[[Example, np.ndarray], tuple[int, int]]
    chunk_size: int = 1024  # tokens of a sequence
    batch_size: int = 8  # sequences

    def lengths(self, wanted: Sequence[int] | None, beyond: int = 8) -> tuple[int, ...]:
        """The lengths that are asked for, ascending; None: that of training and its doubles, up to `beyond` times."""
        if wanted is None:
            return tuple(self.train_length * 2**i for i in range(beyond.bit_length()))
        if not wanted or min(wanted) < 1:
            raise UserError(f"lengths must be positive numbers of tokens, not {list(wanted)}.")
        return tuple(sorted(set(wanted)))

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, without a start token; int32 [tokens]."""
        return self.tokenizer.encode(text)[0 if self.tokenizer.start_token is None else 1 :]

    def begun(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens as a document that begins here: after the start token, where there is one."""
        start = self.tokenizer.start_token
        return tokens if start is None or tokens[:1] == start else np.concatenate([[start], tokens]).astype(np.int32)

    def text(self, tokens: Iterable[int]) -> str:
        """What tokens spell; what is no UTF-8 becomes U+FFFD."""
        return self.tokenizer.decode(tokens).decode(errors="replace")

    def words_of(self, files: str, characters: int) -> str:
        """At least that many characters of text, as documents end to end; repeated where there is too little."""
        found, size = [], 0
        for tokens in self.documents(files):
            found.append(self.text(tokens[: 4 * (characters - size)]))
            size += len(found[-1])
            if size >= characters:
                break
        if not size:
            raise UserError("there is no text: nothing of this run's documents is held out; set the suite's files.")
        return "\n".join(found) if size >= characters else "\n".join(found * (1 + characters // size))

    def stretch(self, files: str, tokens: int) -> np.ndarray:
        """That many tokens as one document, documents end to end, repeated where there are too few; int32 [tokens]."""
        documents = self.documents(files)
        if not sum(map(len, documents)):
            raise UserError("there is no text: nothing of this run's documents is held out; set the suite's files.")
        found, size = [], 0
        while size < tokens:
            for document in documents:
                found.append(document[: tokens - size])
                size += len(found[-1])
                if size >= tokens:
                    break
        return np.concatenate(found).astype(np.int32)


class Suite(Protocol):
    """See the head of this file."""

    Options: type

    def run(self, model: LanguageModel, options: Any, material: Material) -> Iterator[Finding]: ...
