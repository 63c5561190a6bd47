"""The thirteen tasks: each a function from random draws and an amount of haystack to a prompt and its answers.

Prompts are the benchmark's own, so that scores can be compared. `items` is how many of its units the haystack has,
`extra` how many words of filler come after them, which brings a prompt to its length.
"""

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from lcx.errors import UserError
from lcx.evaluation.ruler import words
from lcx.evaluation.scorers import any_contained, share_contained

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = np.linspace(0, 1, 40).round(2)  # of needles in essays


@dataclass(frozen=True)
class Sources:
    """Where haystacks come from."""

    essay: str = ""  # text, long enough for the longest prompt
    squad: str = ""  # a SQuAD file for qa_1
    hotpot: str = ""  # a SQuAD or HotpotQA file for qa_2

    @cached_property
    def essay_words(self) -> list[str]:
        return self.essay.split()

    @cached_property
    def squad_questions(self) -> "Questions":
        return read_questions(self.squad)

    @cached_property
    def hotpot_questions(self) -> "Questions":
        return read_questions(self.hotpot)


Prompt = tuple[str, list[str]]  # and what must be in the answer
Build = Callable[[np.random.Generator, int, int, int, Sources], Prompt]  # (random, index, items, extra, sources)


@dataclass(frozen=True)
class Task:
    """One task of the benchmark."""

    build: Build
    max_tokens: int  # that the model writes; they count in the length
    score: Callable[[str, Sequence[str]], float] = share_contained
    needs: str = ""  # the field of Sources without which it cannot be made
    # Of a target length: the options of `build`, and those to take where these leave no room.
    settings: Callable[[int], Sequence[dict]] = field(default=lambda length: [{}])


def filler(count: int) -> str:
    """That many words of noise on a line of their own; nothing for none."""
    sentence = NOISE.split()
    return "\n" + " ".join(sentence[i % len(sentence)] for i in range(count)) if count else ""


KINDS = {"words": words.pairs, "numbers": words.numbers, "uuids": words.uuids}


def needles(
    random: np.random.Generator,
    index: int,
    items: int,
    extra: int,
    sources: Sources,
    haystack: str,
    key: str = "words",
    value: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Prompt:
    """Needles in a haystack: sentences "One of the special magic numbers for KEY is: VALUE."."""
    names, drawn = KINDS[key](random), KINDS[value](random)
    facts = {next(names): [next(drawn) for _ in range(values)] for _ in range(max(keys, queries))}
    sentences = [_needle(value, name, one) for name, found in facts.items() for one in found]
    asked = list(facts)[:queries]
    sentences = [sentences[i] for i in random.permutation(len(sentences))]
    if haystack == "essay":
        context = _among_essays(random, sources.essay_words, items, sentences)
    elif haystack == "noise":
        context = "\n".join(_among(random, [NOISE] * items, sentences))
    else:
        distractors = [_needle(value, next(names), next(drawn)) for _ in range(items)]
        context = "\n".join(_among(random, distractors, sentences))
    query = asked[0] if queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    many = values * queries > 1
    some, are_all, are, kind = ("Some", "are all", "are", value) if many else ("A", "is", "is", value[:-1])
    prompt = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {kind} afterwards.\n{context}{filler(extra)}\nWhat {are_all} the special magic {kind} for "
        f"{query} mentioned in the provided text? The special magic {kind} for {query} mentioned in the provided text "
        f"{are}"
    )
    return prompt, [one for name in asked for one in facts[name]]


def _needle(kind: str, name: str, value: str) -> str:
    return f"One of the special magic {kind} for {name} is: {value}."


def _among(random: np.random.Generator, lines: list[str], sentences: list[str]) -> list[str]:
    """Sentences at random places of lines."""
    places = np.sort(random.integers(0, len(lines) + 1, len(sentences)))
    return list(np.insert(np.array(lines, object), places, sentences))


def _among_essays(random: np.random.Generator, text: list[str], count: int, sentences: list[str]) -> str:
    """Sentences between those of a text of that many words, at depths of forty."""
    repeated = text * (1 + count // max(len(text), 1)) if text else []
    found = re.split(r"(?<=[.!?])\s+", " ".join(repeated[:count])) if count else []
    depths = np.sort(random.choice(DEPTHS, len(sentences), replace=len(sentences) > len(DEPTHS)))
    places = (depths * len(found)).astype(int)
    return " ".join(np.insert(np.array(found, object), places, sentences))


def variable_tracking(
    random: np.random.Generator, index: int, items: int, extra: int, sources: Sources, example: int = 5
) -> Prompt:
    """Chains of variable assignments, after one that is solved. example: lines of noise of that one."""
    shown, answers = _chain(random, 3, example, 0, "12345")
    asked, expected = _chain(random, 5, items, extra, str(int(random.integers(10_000, 99_999))))
    return f"{shown}{' '.join(answers)}\n\n{asked}", expected


def _chain(random: np.random.Generator, size: int, lines: int, extra: int, value: str, hops: int = 4) -> Prompt:
    names: list[str] = []
    while len(names) <= hops:
        name = words.letters(random, size, string.ascii_uppercase)
        if name not in names:
            names.append(name)
    said = [f"VAR {names[0]} = {value}"]
    said += [f"VAR {later} = VAR {name} " for name, later in zip(names, names[1:], strict=False)]
    context = "\n".join(_among(random, [NOISE] * lines, said))
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}{filler(extra)}\nQuestion: Find all variables that are assigned the value {value} in the text above."
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assigned the value {value}, they are: "
    )
    return prompt, names


def common_words(
    random: np.random.Generator,
    index: int,
    items: int,
    extra: int,
    sources: Sources,
    common: int = 30,
    others: int = 3,
    example: tuple[int, int, int] = (40, 10, 3),
) -> Prompt:
    """The ten words of a list that come most often, after a list that is solved."""
    found = words.singles(random)
    shown, answers = _word_list(random, [next(found) for _ in range(example[0])], *example[1:])
    asked, expected = _word_list(random, [next(found) for _ in range(10 + items)], common, others)
    solved = " ".join(f"{number}. {word}" for number, word in enumerate(answers, start=1))
    return f"{shown} {solved}\n{asked}", expected


def _word_list(random: np.random.Generator, drawn: list[str], common: int, others: int) -> Prompt:
    listed = drawn[:10] * common + drawn[10:] * others
    listed = [listed[i] for i in random.permutation(len(listed))]
    context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The "
        "top 10 words that appear most often in the list are:"
    )
    return prompt, drawn[:10]


def frequent_words(
    random: np.random.Generator, index: int, items: int, extra: int, sources: Sources, vocabulary: int = 80
) -> Prompt:
    """The three coded words that come most often; the most frequent of all is dots, to be ignored."""
    coded: list[str] = []
    while len(coded) < vocabulary:
        word = words.letters(random, 6, string.ascii_lowercase)
        if word not in coded:
            coded.append(word)
    shares = np.arange(1, vocabulary + 1) ** -2.0 / (np.pi**2 / 6)
    counts = (items * shares).astype(int)
    listed = [word for word, count in zip(["..."] + coded[1:], counts, strict=True) for _ in range(count)]
    context = " ".join(listed[i] for i in random.permutation(len(listed)))
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
        "text above, the three most frequently appeared words are:"
    )
    return prompt, coded[1:4]


@dataclass(frozen=True)
class Questions:
    """Questions with their answers and the numbers of the paragraphs that hold them."""

    paragraphs: list[str]
    asked: list[tuple[str, list[str], list[int]]]


def read_questions(path: str) -> Questions:
    """The questions of a file in the form of SQuAD or of HotpotQA. Raises UserError for any other."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the questions of {path}: {error}.") from None
    try:
        found = _of_squad(content["data"]) if isinstance(content, dict) else _of_hotpot(content)
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path} is neither in the form of SQuAD nor of HotpotQA.") from None
    if not found.asked:
        raise UserError(f"{path} holds no question with an answer.")
    return found


def _of_squad(articles: list[dict]) -> Questions:
    paragraphs, asked = [], []
    for article in articles:
        for paragraph in article["paragraphs"]:
            paragraphs.append(paragraph["context"])
            for question in paragraph["qas"]:
                answers = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
                if answers and not question.get("is_impossible"):
                    asked.append((question["question"], answers, [len(paragraphs) - 1]))
    return Questions(paragraphs, asked)


def _of_hotpot(questions: list[dict]) -> Questions:
    numbers: dict[str, int] = {}
    asked = []
    for question in questions:
        gold = {title for title, _ in question["supporting_facts"]}
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]}
        for text in texts.values():
            numbers.setdefault(text, len(numbers))
        asked.append((question["question"], [question["answer"]], [numbers[texts[title]] for title in sorted(gold)]))
    return Questions(list(numbers), asked)


def answer_questions(
    random: np.random.Generator, index: int, items: int, extra: int, sources: Sources, which: str = "squad_questions"
) -> Prompt:
    """A question with its paragraphs among others; `extra` words of one more paragraph come last."""
    questions: Questions = getattr(sources, which)
    question, answers, gold = questions.asked[index % len(questions.asked)]
    others = [i for i in random.permutation(len(questions.paragraphs)).tolist() if i not in gold]
    others = others * (1 + (items + 1) // max(len(others), 1))
    chosen = [*gold, *others[:items]]
    texts = [questions.paragraphs[chosen[i]] for i in random.permutation(len(chosen))]
    if extra and others:
        texts.append(" ".join(questions.paragraphs[others[items]].split(" ")[:extra]))
    context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, start=1))
    told = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    prompt = f"{told}\n\nThe following are given documents.\n\n{context}\n\n{told}\n\nQuestion: {question} Answer:"
    return prompt, answers


def _niah(haystack: str, **options: str | int) -> Task:
    return Task(partial(needles, haystack=haystack, **options), 128)


def _cwe_settings(length: int) -> Sequence[dict]:
    short = dict(common=6, others=1, example=(20, 3, 1))
    return [short] if length < 4096 else [{}, short]


TASKS: dict[str, Task] = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", value="uuids"),
    "niah_multikey_1": _niah("essay", keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": _niah("essay", values=4),
    "niah_multiquery": _niah("essay", keys=4, queries=4),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120, settings=_cwe_settings),
    "fwe": Task(frequent_words, 50, settings=lambda length: [{"vocabulary": max(8, length // 50)}]),
    "qa_1": Task(partial(answer_questions, which="squad_questions"), 32, any_contained, needs="squad"),
    "qa_2": Task(partial(answer_questions, which="hotpot_questions"), 32, any_contained, needs="hotpot"),
}
