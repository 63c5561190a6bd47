"""Samples of exactly known length: as much haystack as fits, and not a word more."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lcx.errors import UserError
from lcx.evaluation.ruler.tasks import TASKS, Sources

WORDS = 256  # at most so many words of filler after the last whole unit


@dataclass(frozen=True)
class Sample:
    """One prompt of a task."""

    prompt: str
    answers: list[str]
    tokens: int  # of the prompt, with those that the model may write


def make_sample(name: str, length: int, index: int, seed: int, count: Callable[[str], int], sources: Sources) -> Sample:
    """The sample of an index: a function of its arguments alone.

    Args:
      name: of a task.
      length: tokens of prompt and answer together; the sample has at most so many, and hardly fewer.
      index, seed: of the draws.
      count: the tokens of a text.
      sources: of haystacks.

    Raises UserError where the task needs a file that is not there, or the length has no room for its prompt.
    """
    task = TASKS[name]
    if task.needs and not getattr(sources, task.needs):
        raise UserError(f"ruler's {name} needs evaluation.options.ruler.{task.needs}, a file of questions.")
    room = length - task.max_tokens

    def build(items: int, extra: int) -> tuple[str, list[str]]:
        return task.build(_random(name, length, index, seed), index, items, extra, sources, **settings)

    fits = lambda items, extra: count(build(items, extra)[0]) <= room  # noqa: E731
    for settings in task.settings(length):  # noqa: B007
        if fits(0, 0):
            break
    else:
        needed = count(build(0, 0)[0]) + task.max_tokens
        raise UserError(f"ruler's {name} has no room in {length} tokens: an empty one takes {needed}.")
    items = largest(lambda items: fits(items, 0), length)
    extra = largest(lambda extra: fits(items, extra), WORDS)
    prompt, answers = build(items, extra)
    return Sample(prompt, answers, count(prompt) + task.max_tokens)


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to a limit for which something holds that holds for 0, and from some number on does not."""
    low, step = 0, 1
    while low + step <= limit and holds(low + step):
        low, step = low + step, 2 * step
    high = min(limit, low + step)
    if low + step > limit and holds(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _random(name: str, length: int, index: int, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"ruler {name} {length} {index} {seed}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
