"""How what a model writes is compared with what it should have written. Every score is in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher


def contains(written: str, expected: str) -> bool:
    """Whether a text has another one in it; upper and lower case are one."""
    return expected.lower() in written.lower()


def share_contained(written: str, expected: Sequence[str]) -> float:
    """RULER's string_match_all: the share of the expected strings that are in a text."""
    return sum(contains(written, one) for one in expected) / len(expected)


def any_contained(written: str, expected: Sequence[str]) -> float:
    """RULER's string_match_part: 1 where one of the expected strings is in a text."""
    return float(any(contains(written, one) for one in expected))


def rouge_1_recall(written: str, expected: str) -> float:
    """The share of the expected words, with their numbers, that a text has."""
    wanted, there = (Counter(re.findall(r"\w+", text.lower())) for text in (expected, written))
    return sum((wanted & there).values()) / max(sum(wanted.values()), 1)


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: SQuAD's normalisation."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(written: str, expected: str) -> float:
    """F1 of the two texts' normalised words."""
    return _f1(normalized(written).split(), normalized(expected).split())


def characters_f1(written: str, expected: str) -> float:
    """F1 of characters, for Chinese, where the official score cuts words with a dictionary; close, not equal."""
    strip = lambda text: [letter for letter in text.lower() if letter.isalnum()]  # noqa: E731
    return _f1(strip(written), strip(expected))


def _f1(written: list[str], expected: list[str]) -> float:
    common = sum((Counter(written) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(written), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def rouge_l(written: str, expected: str) -> float:
    """F-measure of the longest common subsequence of words."""
    return _rouge_l(written.split(), expected.split())


def characters_rouge_l(written: str, expected: str) -> float:
    """The same of characters, for Chinese."""
    return _rouge_l(list("".join(written.split())), list("".join(expected.split())))


def _rouge_l(written: list[str], expected: list[str]) -> float:
    if not written or not expected:
        return 0.0
    lengths = [0] * (len(expected) + 1)
    for word in written:
        diagonal = 0
        for j, other in enumerate(expected):
            above = lengths[j + 1]
            lengths[j + 1] = diagonal + 1 if word == other else max(above, lengths[j])
            diagonal = above
    common = lengths[-1]
    if not common:
        return 0.0
    precision, recall = common / len(written), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def classification(written: str, expected: str, classes: Sequence[str]) -> float:
    """1 over the classes that a text names, where the right one is among them; names within the right name drop out."""
    named = [one for one in classes if one in written]
    named = [one for one in named if not (one in expected and one != expected)]
    return 1 / len(named) if expected in named else 0.0


def count(written: str, expected: str) -> float:
    """The share of a text's numbers that are the expected one."""
    numbers = re.findall(r"\d+", written)
    return sum(number == expected for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(written: str, expected: str, pattern: str = r"Paragraph (\d+)") -> float:
    """The share of a text's numbers that are the number of the expected paragraph."""
    found = re.search(pattern, expected)
    return count(written, found[1]) if found else 0.0


def code_similarity(written: str, expected: str) -> float:
    """Similarity of the first line that is code with the expected one: 2 matches over both lengths."""
    lines = written.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, expected, autojunk=False).ratio()) / 100


def best(score: Callable[..., float], written: str, expected: Sequence[str], **options: Sequence[str]) -> float:
    """The best score over several right answers."""
    return max((score(written, one, **options) for one in expected), default=0.0)
