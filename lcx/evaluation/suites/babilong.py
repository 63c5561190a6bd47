"""BABILong (Kuratov et al., arXiv 2406.10149): bAbI's questions, their facts scattered through books, over local files.

The folder holds <task>/<length>.jsonl or .json (a list), records of input, question and target: qa1/4k.jsonl. A file
prompts.json, {"qa1": {"instruction", "examples", "post_prompt"}}, stands in for the prompts below, which are in the
benchmark's layout but in words of our own.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcx.errors import UserError
from lcx.evaluation.streaming import write
from lcx.evaluation.suite import Finding, Grid, Material
from lcx.evaluation.suites.longbench import read_records
from lcx.models import LanguageModel
from lcx.schema import limited

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), ROOMS) | {
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")
}
_INSTRUCTION = "Somewhere in the context there are facts about {what}. Answer the question from them alone."
WHAT = {
    "qa1": "where people are",
    "qa2": "where things are that people carry",
    "qa3": "where things were before people carried them on",
    "qa4": "which room lies in which direction of another",
    "qa5": "who gave what to whom",
}
_EXAMPLES = {
    "qa1": ("Mary went to the office. Mary moved to the garden.", "Where is Mary?", "garden"),
    "qa2": ("John took the milk. John went to the kitchen.", "Where is the milk?", "kitchen"),
    "qa3": (
        "Mary got the apple. Mary went to the hallway. Mary went to the office.",
        "Where was the apple before the office?",
        "hallway",
    ),
    "qa4": ("The garden is west of the bedroom.", "What is west of the bedroom?", "garden"),
    "qa5": ("Fred handed the football to Jeff.", "Who received the football?", "Jeff"),
}
POST_PROMPT = "Answer with one word."


@dataclass(frozen=True)
class Options:
    """Where the files are."""

    files: str = ""  # the folder
    tasks: tuple[str, ...] = ("qa1", "qa2", "qa3", "qa4", "qa5")
    lengths: tuple[str, ...] = ()  # names of files, "0k", "4k"; none: all that are there
    samples: int = limited(0, minimum=0)  # of each task and length; 0: all
    max_tokens: int = limited(20, minimum=1)  # that the model writes


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields the accuracy of each task at each length, averages, and the grid."""
    folder = Path(options.files)
    for task in options.tasks:
        if task not in LABELS:
            raise UserError(f"evaluation.options.babilong.tasks: {task} has no labels here; there are {list(LABELS)}.")
    lengths = options.lengths or find_lengths(folder, options.tasks)
    if not lengths or not options.files:
        raise UserError("the suite babilong needs evaluation.options.babilong.files, a folder with qa1/4k.jsonl.")
    prompts = read_prompts(folder)
    grid = np.full((len(options.tasks), len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for row, task in enumerate(options.tasks):
            records = read_task(folder / task, length)[: options.samples or None]
            asked = [material.begun(material.encode(prompt(prompts[task], record))) for record in records]
            written = write(model, asked, options.max_tokens, material.chunk_size, material.batch_size)
            right = [is_right(task, material.text(t), r) for t, r in zip(written, records, strict=True)]
            grid[row, column] = np.mean(right)
            yield f"{task}_at_{length}", float(grid[row, column])
        yield f"average_at_{length}", float(grid[:, column].mean())
    yield "accuracy by task and length", Grid(options.tasks, lengths, grid.tolist(), "", "tokens", "accuracy")


def is_right(task: str, written: str, record: dict) -> bool:
    """Whether the first sentence names the target and no other label but those of the question."""
    first = written.lower().split(".")[0].split("<context>")[0].split("<example>")[0].split("question")[0]
    named = {label.lower() for label in LABELS[task]}
    asked = {label for label in named if label in record["question"].lower()}
    return {label for label in named if label in first} - asked == {record["target"].lower()}


def prompt(parts: dict[str, str], record: dict) -> str:
    """Instruction, examples, how to answer, then context and question."""
    return (
        f"{parts['instruction']}\n\n{parts['examples']}\n\n{parts['post_prompt']}\n\n"
        f"<context>\n{record['input']}\n</context>\n\nQuestion: {record['question']}\nAnswer:"
    )


def read_prompts(folder: Path) -> dict[str, dict[str, str]]:
    """The parts of each task's prompt."""
    if (folder / "prompts.json").exists():
        return json.loads((folder / "prompts.json").read_text())
    found = {}
    for task, (context, question, target) in _EXAMPLES.items():
        example = f"<example>\n{context} {question}\nAnswer: {target}\n</example>"
        instruction = _INSTRUCTION.format(what=WHAT[task])
        found[task] = {"instruction": instruction, "examples": example, "post_prompt": POST_PROMPT}
    return found


def find_lengths(folder: Path, tasks: tuple[str, ...]) -> list[str]:
    """The lengths that every task has a file of, shortest first."""
    there = [{path.stem for path in (folder / task).glob("*.json*")} for task in tasks]
    common = set.intersection(*there) if there else set()
    size = lambda name: float(name[:-1]) * {"k": 1e3, "m": 1e6}.get(name[-1].lower(), 1)  # noqa: E731
    return sorted((name for name in common if name[:-1].replace(".", "").isdigit()), key=size)


def read_task(folder: Path, length: str) -> list[dict]:
    """The records of a task at a length. Raises UserError where there is no file, or it is damaged."""
    whole = folder / f"{length}.json"
    if not whole.exists():
        return read_records(folder / f"{length}.jsonl")
    try:
        return json.loads(whole.read_text())
    except ValueError:
        return read_records(whole)
