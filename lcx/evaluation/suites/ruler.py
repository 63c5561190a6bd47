"""RULER: thirteen synthetic tasks by length, and the length up to which a model is worth its context.

Hsieh et al., arXiv 2404.06654. The benchmark draws 500 samples for each task and length; the first ones of a seed are
the same, however many are drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lcx.errors import UserError, suggest
from lcx.evaluation.ruler import TASKS, Sample, Sources, make_sample
from lcx.evaluation.streaming import write
from lcx.evaluation.suite import Curves, Finding, Grid, Material
from lcx.models import LanguageModel
from lcx.schema import limited

THRESHOLD = 85.6  # Llama-2-7B's average at 4K: a length is effective from here on


@dataclass(frozen=True)
class Options:
    """Which tasks, and where their text comes from."""

    tasks: tuple[str, ...] = ()  # none: all for which there is a source
    lengths: tuple[int, ...] | None = None  # tokens of prompt and answer; None: 4, 8 and 16 times those of training
    samples: int = limited(20, minimum=1)
    seed: int = limited(42, minimum=0)
    files: str = ""  # a file or folder of essays; "": what the run holds out
    squad: str = ""  # a file in the form of SQuAD, for qa_1
    hotpot: str = ""  # a file in the form of HotpotQA or SQuAD, for qa_2


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields each task's score at each length, averages (all in percent) and the effective length."""
    lengths = material.lengths(options.lengths or [material.train_length * share for share in (4, 8, 16)])
    sources = Sources(material.words_of(options.files, 8 * lengths[-1]), options.squad, options.hotpot)
    tasks = chosen_tasks(options)
    for length in lengths:
        for task in tasks:
            _sample(task, length, 0, options, sources, material)  # what has no room is said before hours are spent
    grid = np.zeros((len(tasks), len(lengths)))
    for column, length in enumerate(lengths):
        for row, task in enumerate(tasks):
            grid[row, column] = 100 * _score(model, task, length, options, sources, material)
            yield f"{task}_at_{length}", float(grid[row, column])
        yield f"average_at_{length}", float(grid[:, column].mean())
    averages = grid.mean(axis=0).tolist()
    yield "effective_length", effective_length(dict(zip(lengths, averages, strict=True)))
    yield "score by task and length", Grid(tasks, lengths, grid.tolist(), "", "tokens", "score", (0.0, 100.0))
    yield "average by length", Curves(lengths, {"average": averages}, "tokens", "score", log_x=True)


def chosen_tasks(options: Options) -> list[str]:
    """The tasks that are asked for. Raises UserError for an unknown one."""
    for name in options.tasks:
        if name not in TASKS:
            raise UserError(f'evaluation.options.ruler.tasks: unknown task "{name}": {suggest(name, TASKS)}')
    have = [name for name, task in TASKS.items() if not task.needs or getattr(options, task.needs)]
    return list(options.tasks) or have


def effective_length(averages: dict[int, float]) -> float:
    """The largest length whose average reaches the threshold; 0 where none does."""
    return float(max((length for length, average in averages.items() if average >= THRESHOLD), default=0))


def _score(
    model: LanguageModel, task: str, length: int, options: Options, sources: Sources, material: Material
) -> float:
    samples = [_sample(task, length, index, options, sources, material) for index in range(options.samples)]
    prompts = [material.begun(material.encode(sample.prompt)) for sample in samples]
    written = write(model, prompts, TASKS[task].max_tokens, material.chunk_size, material.batch_size)
    scores = [
        TASKS[task].score(material.text(tokens), sample.answers)
        for tokens, sample in zip(written, samples, strict=True)
    ]
    return float(np.mean(scores))


def _sample(task: str, length: int, index: int, options: Options, sources: Sources, material: Material) -> Sample:
    count = lambda text: len(material.begun(material.encode(text)))  # noqa: E731
    return make_sample(task, length, index, options.seed, count, sources)
