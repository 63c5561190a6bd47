"""What a synthetic task is, how its examples become rows, and how answers to them are scored."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lcx.config import SourceConfig
from lcx.data.documents import Documents
from lcx.data.packing import Piece
from lcx.data.shuffle import make_key
from lcx.data.synthetic import symbols, text
from lcx.data.synthetic.layout import Layout, TooShort
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError, suggest
from lcx.schema import build, limited

TASKS = symbols.TASKS | text.TASKS  # name: (generator, dataclass of its options)


@dataclass(frozen=True)
class TaskOptions:
    """What every task has; it stands beside the task's own options."""

    length: int = limited(512, minimum=16)  # tokens of an example
    heldout: int = limited(32, minimum=0)  # examples that are held out, of seeds that are never trained on
    loss: Literal["answers", "all"] = "answers"  # what counts in training


@dataclass(frozen=True)
class Example:
    """One problem with its answers."""

    tokens: np.ndarray
    """int32 [length]."""
    answers: np.ndarray
    """int32 [length]: the number of the answer that a token belongs to, from 1; 0 for the problem."""
    accepted: dict[int, frozenset[int]]
    """Places where several tokens are right, and which; elsewhere only the token itself is."""


def score(example: Example, predictions: np.ndarray) -> tuple[int, int]:
    """(answers that are wholly right, answers) of an example.

    predictions: int [length]; at each place the token that is predicted there from those before it.
    """
    right = predictions == example.tokens
    for place, tokens in example.accepted.items():
        right[place] = int(predictions[place]) in tokens
    wrong = np.unique(example.answers[~right])
    everything = np.unique(example.answers)
    return int(np.sum(everything > 0) - np.sum(wrong > 0)), int(np.sum(everything > 0))


class Task:
    """A task with its options: examples by index."""

    def __init__(self, name: str, common: TaskOptions, options: Any, tokenizer: Tokenizer):
        self.name, self.common, self.options, self.tokenizer = name, common, options, tokenizer
        described = [name, dataclasses.asdict(common), dataclasses.asdict(options), tokenizer.fingerprint]
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def example(self, index: int, seed: int = 0, heldout: bool = False) -> Example:
        """The example of an index. Held-out examples are of keys that no example for training has."""
        split = "heldout" if heldout else "train"
        random = np.random.Generator(np.random.Philox(key=make_key(f"synthetic {self.name} {split}", seed, index)))
        start = [] if self.tokenizer.start_token is None else [self.tokenizer.start_token]
        layout: Layout = TASKS[self.name][0](random, self.common.length - len(start), self.options, self.tokenizer)
        places = {place + len(start): tokens for place, tokens in layout.accepted.items()}
        return Example(
            np.array([*start, *layout.tokens], np.int32), np.array([0] * len(start) + layout.answers, np.int32), places
        )

    def heldout(self) -> Documents:
        """The held-out examples, of which the answers count."""
        examples = [self.example(i, heldout=True) for i in range(self.common.heldout)]
        tokens = np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)])
        scored = np.concatenate([np.empty(0, bool), *(example.answers > 0 for example in examples)])
        offsets = np.arange(len(examples) + 1, dtype=np.int64) * self.common.length
        return Documents(tokens, offsets, [f"{self.name}:{i}" for i in range(len(examples))], scored)


def make_task(source: SourceConfig, tokenizer: Tokenizer) -> Task:
    """The task that a source names. Raises UserError for an unknown task or option, or examples that are too short."""
    where = f'data.sources "{source.name}"'
    if source.path not in TASKS:
        raise UserError(f'{where}: unknown task "{source.path}": {suggest(source.path, TASKS)}')
    if source.path in symbols.TASKS and tokenizer.vocab_size < symbols.VOCAB_SIZE:
        raise UserError(
            f"{where}: {source.path} needs {symbols.VOCAB_SIZE} tokens, and the tokenizer has {tokenizer.vocab_size}."
        )
    _, Options = TASKS[source.path]
    common = {name: value for name, value in source.options.items() if name in TaskOptions.__dataclass_fields__}
    own = {name: value for name, value in source.options.items() if name not in common}
    task = Task(
        source.path, build(TaskOptions, common, f"{where} options"), build(Options, own, f"{where} options"), tokenizer
    )
    try:
        task.example(0)
    except TooShort as error:
        raise UserError(f"{where}: {error} of {source.path} with options.length={task.common.length}.") from None
    return task


@dataclass(frozen=True)
class Examples:
    """Packs whole examples into rows: as many as a row holds, the rest is padding."""

    task: Task
    seed: int
    length: int

    def rows(self, numbers: np.ndarray) -> list[list[Piece]]:
        """See lcx.data.rows.Packer. An example of n tokens takes n - 1 places."""
        many = self.length // (self.task.common.length - 1)
        return [[self._piece(int(number) * many + i) for i in range(many)] for number in numbers]

    def names(self, number: int) -> list[str]:
        """See lcx.data.rows.Packer."""
        many = self.length // (self.task.common.length - 1)
        return [f"{self.task.name}:{number * many + i}" for i in range(many)]

    def _piece(self, index: int) -> Piece:
        example = self.task.example(index, self.seed)
        counts = example.answers > 0 if self.task.common.loss == "answers" else np.ones(example.tokens.shape, bool)
        first = np.zeros(example.tokens.shape, bool)
        first[0] = True
        return Piece(example.tokens, counts.astype(np.float32), first)
