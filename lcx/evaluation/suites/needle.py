"""A needle in a haystack: one odd sentence in essays, at each length and depth (Kamradt 2023).

The original is scored by another model. A base model is asked with the beginning of the answer, and scored by whether
the rest of the needle is in what it writes (and by the share of the needle's words that are).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lcx.errors import UserError
from lcx.evaluation.scorers import contains, rouge_1_recall
from lcx.evaluation.streaming import write
from lcx.evaluation.suite import Finding, Grid, Material
from lcx.models import LanguageModel
from lcx.schema import limited


@dataclass(frozen=True)
class Options:
    """The grid, the needle and the text around it."""

    files: str = ""  # a file or folder of essays; "": what the run holds out
    lengths: tuple[int, ...] | None = None  # tokens of a prompt, the buffer left free; None: as of perplexity
    depths: int = limited(11, minimum=1)
    buffer: int = limited(200, minimum=0)  # tokens of a length that are left for question and answer
    needle: str = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
    question: str = "What is the best thing to do in San Francisco?"
    answer_begins: str = "The best thing to do in San Francisco is"  # what the model goes on from
    max_tokens: int = limited(96, minimum=1)  # that it writes


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields the share of needles found at each length, and grids of both scores by length and depth."""
    lengths = material.lengths(options.lengths)
    depths = np.linspace(0, 1, options.depths).round(3).tolist() if options.depths > 1 else [0.5]
    expected = options.needle.removeprefix(options.answer_begins).strip(" .")
    found, recalled = np.zeros((2, len(depths), len(lengths)))
    for column, length in enumerate(lengths):
        prompts = [prompt(length, depth, options, material) for depth in depths]
        written = write(model, prompts, options.max_tokens, material.chunk_size, material.batch_size)
        texts = [material.text(tokens) for tokens in written]
        found[:, column] = [contains(text, expected) for text in texts]
        recalled[:, column] = [rouge_1_recall(text, expected) for text in texts]
        yield f"found_at_{length}", float(found[:, column].mean())
    yield "found", float(found.mean())
    for name, grid in (("found", found), ("rouge-1 recall", recalled)):
        yield f"{name} by length and depth", Grid(depths, lengths, grid.tolist(), "depth", "tokens", name)


def prompt(length: int, depth: float, options: Options, material: Material) -> np.ndarray:
    """Essays with the needle after the period that is nearest before its depth, then the question; int32 [tokens].

    With the buffer it has `length` tokens. Raises UserError where that leaves no room for an essay.
    """
    needle = material.encode(" " + options.needle)
    ending = material.encode(f"\n\nQuestion: {options.question}\nAnswer: {options.answer_begins}")
    room = length - options.buffer - len(needle)
    if room < 1:
        raise UserError(f"a needle of {len(needle)} tokens and a buffer of {options.buffer} leave no room in {length}.")
    essay = material.encode(material.words_of(options.files, 8 * room))
    while len(essay) < room:
        essay = np.concatenate([essay, essay])
    essay = essay[:room]
    place = round(depth * room)
    if place < room:  # as far back as the previous period, or to the beginning
        periods = np.flatnonzero([b"." in material.tokenizer.decode([token]) for token in essay[:place]])
        place = int(periods[-1]) + 1 if len(periods) else 0
    return material.begun(np.concatenate([essay[:place], needle, essay[place:], ending]).astype(np.int32))
