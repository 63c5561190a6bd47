"""LongBench (Bai et al., arXiv 2308.14508), over local files of the benchmark.

The folder holds what the benchmark's release does: a <task>.jsonl each (fields input, context, answers, all_classes,
length) and dataset2prompt.json, the prompts. LongBench-E's files, <task>_e.jsonl, are scored by length too.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lcx.errors import UserError
from lcx.evaluation import scorers
from lcx.evaluation.streaming import write
from lcx.evaluation.suite import Finding, Grid, Material
from lcx.models import LanguageModel
from lcx.schema import limited

PROMPTS = "dataset2prompt.json"
CHINESE_PARAGRAPH = "\u6bb5\u843d(\\d+)"
Score = Callable[..., float]

# The score, and how many tokens the model may write.
TASKS: dict[str, tuple[Score, int]] = {
    "narrativeqa": (scorers.f1, 128),
    "qasper": (scorers.f1, 128),
    "multifieldqa_en": (scorers.f1, 64),
    "multifieldqa_zh": (scorers.characters_f1, 64),
    "hotpotqa": (scorers.f1, 32),
    "2wikimqa": (scorers.f1, 32),
    "musique": (scorers.f1, 32),
    "dureader": (scorers.characters_rouge_l, 128),
    "gov_report": (scorers.rouge_l, 512),
    "qmsum": (scorers.rouge_l, 512),
    "multi_news": (scorers.rouge_l, 512),
    "vcsum": (scorers.characters_rouge_l, 512),
    "trec": (scorers.classification, 64),
    "triviaqa": (scorers.f1, 32),
    "samsum": (scorers.rouge_l, 128),
    "lsht": (scorers.classification, 64),
    "passage_count": (scorers.count, 32),
    "passage_retrieval_en": (scorers.retrieval, 32),
    "passage_retrieval_zh": (partial(scorers.retrieval, pattern=CHINESE_PARAGRAPH), 32),
    "lcc": (scorers.code_similarity, 64),
    "repobench-p": (scorers.code_similarity, 64),
}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of what is written, the rest does not count
BUCKETS = ((0, 4000, "0-4k"), (4000, 8000, "4-8k"), (8000, 10**9, "8k+"))  # of LongBench-E, in words


@dataclass(frozen=True)
class Options:
    """Where the files are."""

    files: str = ""  # the folder
    tasks: tuple[str, ...] = ()  # none: all that have a file
    length: int | None = limited(None, minimum=64)  # tokens of a prompt and what is written; None: 8 times training's
    samples: int = limited(0, minimum=0)  # of each task; 0: all


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields each task's score and their average, in percent."""
    folder = Path(options.files)
    prompts = read_prompts(folder)
    names = options.tasks or [path.stem for path in sorted(folder.glob("*.jsonl")) if base(path.stem) in TASKS]
    if not names or not options.files:
        raise UserError("the suite longbench needs evaluation.options.longbench.files, a folder of <task>.jsonl files.")
    scores, by_length = {}, {}
    for name in names:
        records = read_records(folder / f"{name}.jsonl")[: options.samples or None]
        found = answer(model, base(name), records, prompts, options, material)
        scores[name] = 100 * float(np.mean(found))
        yield name, scores[name]
        if name.endswith("_e"):
            by_length[name] = [_mean(found, records, low, high) for low, high, _ in BUCKETS]
    yield "average", float(np.mean(list(scores.values())))
    if by_length:
        columns = [label for _, _, label in BUCKETS]
        yield (
            "score by task and length",
            Grid(list(by_length), columns, list(by_length.values()), "", "words", "score", (0.0, 100.0)),
        )


def answer(
    model: LanguageModel,
    task: str,
    records: list[dict[str, Any]],
    prompts: dict[str, str],
    options: Options,
    material: Material,
) -> list[float]:
    """The score of each record."""
    _, max_tokens = TASKS[task]
    room = (options.length or 8 * material.train_length) - max_tokens
    asked = [cut(material.encode(prompts[task].format(**record)), room, material) for record in records]
    written = write(model, asked, max_tokens, material.chunk_size, material.batch_size)
    return [score(task, material.text(tokens), record) for tokens, record in zip(written, records, strict=True)]


def score(task: str, written: str, record: dict[str, Any]) -> float:
    """The best score of what was written over a record's answers."""
    if task in FIRST_LINE:
        written = written.lstrip("\n").split("\n")[0]
    measure, _ = TASKS[task]
    classes = {"classes": record["all_classes"]} if measure is scorers.classification else {}
    return scorers.best(measure, written, record["answers"], **classes)


def cut(tokens: np.ndarray, room: int, material: Material) -> np.ndarray:
    """The first and the last half of a prompt that is too long."""
    room -= material.tokenizer.start_token is not None
    if len(tokens) > room:
        tokens = np.concatenate([tokens[: room // 2], tokens[len(tokens) - (room - room // 2) :]])
    return material.begun(tokens)


def base(name: str) -> str:
    """A task's name without LongBench-E's ending."""
    return name.removesuffix("_e")


def read_prompts(folder: Path) -> dict[str, str]:
    """The prompt of each task. Raises UserError where the file is not there."""
    try:
        return json.loads((folder / PROMPTS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the suite longbench needs {PROMPTS} of the benchmark beside its data: {error}.") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines. Raises UserError."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None


def _mean(scores: list[float], records: list[dict[str, Any]], low: int, high: int) -> float | None:
    chosen = [one for one, record in zip(scores, records, strict=True) if low <= record["length"] < high]
    return 100 * float(np.mean(chosen)) if chosen else None
