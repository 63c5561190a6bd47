"""Tasks in symbols: tokens FIRST, FIRST + 1, ..., printable where tokens are bytes.

Each is a function (random, length, options, tokenizer) -> Layout of exactly `length` tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcx.data.synthetic.layout import Layout, TooShort
from lcx.data.tokenizers import Tokenizer
from lcx.schema import limited

FIRST = 33
VOCAB_SIZE = 256  # what all of them stay below
BLANK, SEPARATOR, QUESTION = FIRST, FIRST + 1, FIRST + 2
SYMBOLS = FIRST + 3  # the first token that means nothing of itself


@dataclass(frozen=True)
class Recall:
    """Keys with values, then keys whose values are asked for."""

    pairs: int = limited(8, minimum=1)
    queries: int = limited(8, minimum=1)  # each of another key, unless they are more than the pairs
    symbols: int = limited(80, minimum=4, maximum=200)  # half of them keys, half of them values


@dataclass(frozen=True)
class JointRecall:
    """Contexts, each with a value of its own for each key."""

    contexts: int = limited(4, minimum=1)
    keys: int = limited(4, minimum=1)
    queries: int = limited(4, minimum=1)
    symbols: int = limited(80, minimum=6, maximum=200)  # a third each


@dataclass(frozen=True)
class Copying:
    """A string that comes again."""

    count: int | None = limited(None, minimum=1)  # its symbols; None: as many as there is room for
    symbols: int = limited(64, minimum=2, maximum=200)


@dataclass(frozen=True)
class SelectiveCopying:
    """Symbols at random places among blanks."""

    count: int = limited(16, minimum=1)
    symbols: int = limited(64, minimum=2, maximum=200)


@dataclass(frozen=True)
class Induction:
    """One sign, and what followed it."""

    symbols: int = limited(64, minimum=2, maximum=200)


@dataclass(frozen=True)
class Counting:
    """How often a symbol came."""

    symbols: int = limited(8, minimum=2, maximum=80)


@dataclass(frozen=True)
class Automaton:
    """A finite automaton drawn for each example."""

    states: int = limited(6, minimum=2, maximum=64)
    symbols: int = limited(12, minimum=2, maximum=80)
    edges: int = limited(3, minimum=1)  # symbols that each state allows
    word: int = limited(12, minimum=1)  # symbols of a word, on average


@dataclass(frozen=True)
class Hierarchy:
    """Documents of paragraphs of sentences of symbols."""

    documents: int = limited(2, minimum=1, maximum=20)
    paragraphs: int = limited(2, minimum=1, maximum=20)  # a document
    sentences: int = limited(2, minimum=1, maximum=20)  # a paragraph
    words: int = limited(4, minimum=1, maximum=20)  # symbols of a sentence
    span: Literal["any", "token", "sentence", "paragraph", "document"] = "any"  # any: one of them for each example
    symbols: int = limited(64, minimum=2, maximum=120)


def associative_recall(random: np.random.Generator, length: int, options: Recall, _: Tokenizer) -> Layout:
    """Multi-query associative recall (Arora et al., arXiv 2312.04927): queries lie at random distances.

    Where each key is asked once, the values not given yet are good guesses without any recall; keys that come again
    take that away.
    """
    half = options.symbols // 2
    if options.pairs > half:
        raise TooShort("there are not enough symbols for the pairs")
    keys = SYMBOLS + random.permutation(half)[: options.pairs]
    values = SYMBOLS + half + random.integers(0, half, options.pairs)
    layout = Layout().add(np.stack([keys, values], axis=1).ravel())
    if options.queries > options.pairs:
        asked = random.integers(0, options.pairs, options.queries)
    else:
        asked = random.permutation(options.pairs)[: options.queries]
    room = length - len(layout.tokens) - 2 * len(asked)
    if room < 0:
        raise TooShort("there is no room for the pairs and queries")
    gaps = np.diff([0, *np.sort(random.integers(0, room + 1, len(asked))), room])
    for gap, pair in zip(gaps, asked, strict=False):
        layout.add([BLANK] * gap).add([keys[pair]]).add([values[pair]], answer=True)
    return layout.add([BLANK] * gaps[-1])


def joint_recall(random: np.random.Generator, length: int, options: JointRecall, _: Tokenizer) -> Layout:
    """Joint recall (Zhan et al., arXiv 2507.00449): a value belongs to a context and a key together."""
    third = options.symbols // 3
    if max(options.contexts, options.keys) > third or options.queries > options.contexts * options.keys:
        raise TooShort("there are not enough symbols for the contexts and keys, or pairs for the queries,")
    contexts = SYMBOLS + random.permutation(third)[: options.contexts]
    keys = SYMBOLS + third + random.permutation(third)[: options.keys]
    values = SYMBOLS + 2 * third + random.integers(0, third, (options.contexts, options.keys))
    layout = Layout()
    for i, context in enumerate(contexts):
        layout.add([context])
        for j in random.permutation(options.keys):
            layout.add([keys[j], values[i, j]])
    room = length - len(layout.tokens) - 1 - 3 * options.queries
    if room < 0:
        raise TooShort("there is no room for the contexts and queries")
    layout.add([BLANK] * room + [SEPARATOR])
    for pair in random.permutation(options.contexts * options.keys)[: options.queries]:
        i, j = divmod(int(pair), options.keys)
        layout.add([contexts[i], keys[j]]).add([values[i, j]], answer=True)
    return layout


def copying(random: np.random.Generator, length: int, options: Copying, _: Tokenizer) -> Layout:
    """A string, a separator, the string again (Jelassi et al., arXiv 2402.01032)."""
    count = (length - 1) // 2 if options.count is None else options.count
    word = SYMBOLS + random.integers(0, options.symbols, count)
    return Layout().add(word).add([SEPARATOR]).add(word, answer=True).padded(length, BLANK)


def selective_copying(random: np.random.Generator, length: int, options: SelectiveCopying, _: Tokenizer) -> Layout:
    """Symbols among blanks, a separator, the symbols in their order (Gu and Dao, arXiv 2312.00752, section 4.1.1)."""
    room = length - 1 - options.count
    if room < options.count:
        raise TooShort("there is no room for the symbols")
    word = SYMBOLS + random.integers(0, options.symbols, options.count)
    field = np.full(room, BLANK)
    field[np.sort(random.permutation(room)[: options.count])] = word
    return Layout().add(field).add([SEPARATOR]).add(word, answer=True)


def induction(random: np.random.Generator, length: int, options: Induction, _: Tokenizer) -> Layout:
    """A sign somewhere in noise, and at the end again: what followed it? (Gu and Dao, section 4.1.2.)"""
    noise = SYMBOLS + random.integers(0, options.symbols, length - 2)
    place = int(random.integers(0, length - 3))
    noise[place] = QUESTION
    return Layout().add(noise).add([QUESTION]).add([noise[place + 1]], answer=True)


def counting(random: np.random.Generator, length: int, options: Counting, _: Tokenizer) -> Layout:
    """How often a symbol came, as decimal digits of a fixed number."""
    digits = len(str(length))
    field = random.integers(0, options.symbols, length - 2 - digits)
    # One more draw for how often the asked symbol comes at all, so that the answer is not always near the mean.
    asked = int(random.integers(options.symbols))
    common = random.random(len(field)) < random.random()
    field = np.where(common, asked, field)
    number = f"{int(np.sum(field == asked)):0{digits}}"
    first_digit = SYMBOLS + options.symbols
    answer = [first_digit + int(digit) for digit in number]
    return Layout().add(SYMBOLS + field).add([QUESTION, SYMBOLS + asked]).add(answer, answer=True)


def formal_language(random: np.random.Generator, length: int, options: Automaton, _: Tokenizer) -> Layout:
    """Words of a random finite automaton (Akyurek et al., arXiv 2401.12973): each symbol is an answer.

    Right is any symbol that the automaton allows, or the separator after a word's last. What a word begins with is
    not known before: its first symbol is not scored.
    """
    edges = min(options.edges, options.symbols)
    allowed = np.stack([random.permutation(options.symbols)[:edges] for _ in range(options.states)])
    target = random.integers(0, options.states, allowed.shape)
    layout, state, since = Layout(), 0, 0
    while len(layout.tokens) < length:
        ends = since > 0 and random.random() < 1 / options.word
        edge = int(random.integers(edges))
        token = SEPARATOR if ends else SYMBOLS + int(allowed[state, edge])
        if since:
            layout.accepted[len(layout.tokens)] = frozenset((SYMBOLS + allowed[state]).tolist()) | {SEPARATOR}
        layout.add([token], answer=since > 0)
        state, since = (0, 0) if ends else (int(target[state, edge]), since + 1)
    return layout


SPANS = ("token", "sentence", "paragraph", "document")


def hierarchical_recall(random: np.random.Generator, length: int, options: Hierarchy, _: Tokenizer) -> Layout:
    """A text in levels, each part under its number; then a part's address, and the answer is all that it holds."""
    sizes = (options.documents, options.paragraphs, options.sentences, options.words)
    words = SYMBOLS + random.integers(0, options.symbols, sizes)
    marks = [SYMBOLS + options.symbols + 20 * level for level in range(4)]  # 20 numbers for each level
    layout = Layout()
    for d in range(sizes[0]):
        layout.add([marks[0] + d])
        for p in range(sizes[1]):
            layout.add([marks[1] + p])
            for s in range(sizes[2]):
                layout.add([marks[2] + s]).add(words[d, p, s])
    level = int(random.integers(4)) if options.span == "any" else SPANS.index(options.span)
    address = [int(random.integers(size)) for size in sizes[: 4 - level]]
    layout.add([QUESTION, *(marks[i] + number for i, number in enumerate(address)), SEPARATOR])
    return layout.add(words[tuple(address)].ravel(), answer=True).padded(length, BLANK)


TASKS = {
    "associative_recall": (associative_recall, Recall),
    "joint_recall": (joint_recall, JointRecall),
    "copying": (copying, Copying),
    "selective_copying": (selective_copying, SelectiveCopying),
    "induction": (induction, Induction),
    "counting": (counting, Counting),
    "formal_language": (formal_language, Automaton),
    "hierarchical_recall": (hierarchical_recall, Hierarchy),
}
