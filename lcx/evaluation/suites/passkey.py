"""Passkey retrieval: a number hidden in filler, at each length and depth (Mohtashami and Jaggi, arXiv 2305.16300)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcx.evaluation.streaming import write
from lcx.evaluation.suite import Example, Finding, Grid, Material
from lcx.models import LanguageModel
from lcx.schema import limited


@dataclass(frozen=True)
class Options:
    """The grid, and the text."""

    lengths: tuple[int, ...] | None = None  # tokens of question and answer together; None: as of perplexity
    depths: int = limited(11, minimum=1)  # from 0, before the filler, to 1, after it
    samples: int = limited(5, minimum=1)  # for each length and depth
    digits: int | None = limited(5, minimum=1, maximum=18)  # None: a number from 1 to 50,000
    style: Literal["plain", "landmark"] = "landmark"  # the text; plain is what the synthetic task trains by default


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields the accuracy at each length, the mean, and the grid of lengths and depths."""
    lengths = material.lengths(options.lengths)
    depths = np.linspace(0, 1, options.depths).round(3).tolist() if options.depths > 1 else [0.5]
    grid = np.zeros((len(depths), len(lengths)))
    for column, length in enumerate(lengths):
        examples = [example for depth in depths for example in _examples(length, depth, options, material)]
        right = np.array(answer(model, examples, material), np.float64)
        grid[:, column] = right.reshape(len(depths), -1).mean(axis=1)
        yield f"accuracy_at_{length}", float(grid[:, column].mean())
    yield "accuracy", float(grid.mean())
    yield "accuracy by length and depth", Grid(depths, lengths, grid.tolist(), "depth", "tokens", "accuracy")


def _examples(length: int, depth: float, options: Options, material: Material) -> list[Example]:
    chosen = {"length": length, "depth": depth, "digits": options.digits, "style": options.style}
    return material.examples("passkey", chosen, options.samples)


def answer(model: LanguageModel, examples: list[Example], material: Material) -> list[bool]:
    """Whether the first number that the model writes after each question is the key."""
    prompts = [example.tokens[example.answers == 0] for example in examples]
    keys = [material.text(example.tokens[example.answers > 0]) for example in examples]
    longest = max(int(np.sum(example.answers > 0)) for example in examples)
    written = write(model, prompts, longest + 2, material.chunk_size, material.batch_size)
    return [first_number(material.text(tokens)) == int(key) for tokens, key in zip(written, keys, strict=True)]


def first_number(text: str) -> int | None:
    """The first run of digits in a text; None where there is none."""
    found = re.search(r"\d+", text)
    return int(found[0]) if found else None
