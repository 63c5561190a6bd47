"""Recall: exact answers to held-out examples of synthetic tasks, in one pass over each.

An answer counts where each of its tokens is the likeliest one after what stands before it, which is just when greedy
writing gives it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcx.evaluation.streaming import stream
from lcx.evaluation.suite import Curves, Finding, Material
from lcx.models import LanguageModel
from lcx.schema import limited


@dataclass(frozen=True)
class Options:
    """Which tasks."""

    tasks: tuple[str, ...] = ("associative_recall", "joint_recall", "selective_copying", "induction", "phonebook")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of tasks, by name
    lengths: tuple[int, ...] | None = None  # tokens of an example; None: of training, and 2 and 4 times as many
    samples: int = limited(64, minimum=1)  # for each task and length


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields the accuracy of each task at each length, and curves of it."""
    lengths = material.lengths(options.lengths, beyond=4)
    curves = {}
    for task in options.tasks:
        curves[task] = []
        for length in lengths:
            chosen = {**options.options.get(task, {}), "length": length}
            accuracy = solve(model, material.examples(task, chosen, options.samples), material)
            curves[task].append(accuracy)
            yield f"{task}_at_{length}", accuracy
    yield "mean", float(np.mean(list(curves.values())))
    marks = {"training length": material.train_length}
    yield "accuracy by length", Curves(lengths, curves, "tokens", "accuracy", log_x=True, marks=marks)


def solve(model: LanguageModel, examples: list, material: Material) -> float:
    """The share of the examples' answers that are right; the examples are all of one length."""
    right, asked = 0, 0
    for start in range(0, len(examples), material.batch_size):
        chosen = examples[start : start + material.batch_size]
        rows = np.stack([example.tokens for example in chosen])
        pieces = stream(model, rows, material.chunk_size, predict=True, score=False)
        predicted = np.concatenate([piece.predictions for piece in pieces], axis=1)
        for example, row in zip(chosen, predicted, strict=True):
            hits, answers = material.score(example, np.concatenate([[-1], row]))
            right, asked = right + hits, asked + answers
    return right / max(asked, 1)
