"""Tasks in words, for any tokenizer.

Each is a function (random, length, options, tokenizer) -> Layout of exactly `length` tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcx.data.synthetic.layout import FILLER, Layout, TooShort, encode, haystack
from lcx.data.tokenizers import Tokenizer
from lcx.schema import limited


@dataclass(frozen=True)
class Passkey:
    """A number in a text that says nothing."""

    digits: int | None = limited(5, minimum=1, maximum=18)  # None: a number from 1 to 50,000, as was published
    depth: float | None = limited(None, minimum=0, maximum=1)  # where the number stands in the text; None: anywhere
    style: Literal["plain", "landmark"] = "plain"  # landmark: the sentences and the filler of arXiv 2305.16300


@dataclass(frozen=True)
class Phonebook:
    """Names with numbers."""

    entries: int | None = limited(None, minimum=1)  # None: as many as there is room for
    digits: int = limited(7, minimum=1, maximum=18)


@dataclass(frozen=True)
class VariableTracking:
    """Variables that hold numbers, and variables that hold those."""

    chains: int = limited(2, minimum=1)
    hops: int = limited(3, minimum=1)  # variables of a chain after its first


@dataclass(frozen=True)
class ThreadFollowing:
    """Names that lead to names."""

    threads: int = limited(4, minimum=1)
    steps: int = limited(4, minimum=1)  # names after the first


def passkey(random: np.random.Generator, length: int, options: Passkey, tokenizer: Tokenizer) -> Layout:
    """A number to be remembered (Mohtashami and Jaggi, arXiv 2305.16300)."""
    if options.digits is None:
        key = str(int(random.integers(1, 50_001)))
    else:
        key = "".join(str(digit) for digit in random.integers(0, 10, options.digits))
    beginning, filler, fact, question = PASSKEY_STYLES[options.style]
    ending = [(question, False), (key, True)]
    facts = [fact.format(key=key)]
    return haystack(random, length, tokenizer, facts, ending, filler, beginning, options.depth)


GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
# What stands before the filler, the filler, the sentence with the key, the question.
PASSKEY_STYLES = {
    "plain": (
        "",
        FILLER,
        " The pass key is {key}. Remember it: {key} is the pass key. ",
        " What is the pass key? The pass key is ",
    ),
    "landmark": (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n",
        GRASS,
        "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        "\nWhat is the pass key? The pass key is ",
    ),
}


def phonebook(random: np.random.Generator, length: int, options: Phonebook, tokenizer: Tokenizer) -> Layout:
    """A number by its name, among as many as there is room for (Jelassi et al., arXiv 2402.01032)."""
    number = lambda: "".join(str(digit) for digit in random.integers(0, 10, options.digits))  # noqa: E731
    most = options.entries or max(1, length // 8)
    entries, names, used = [], set(), 0
    budget = length - len(encode(tokenizer, "\n" + _name(random) + ": " + number())) - 24
    for _ in range(most):
        name = _fresh(random, names)
        entry = (name, number())
        used += len(encode(tokenizer, f"{name}: {entry[1]}\n"))
        if used > budget and options.entries is None and entries:
            break
        entries.append(entry)
    name, answer = entries[int(random.integers(len(entries)))]
    facts = [f"{name}: {digits}\n" for name, digits in entries]
    return haystack(random, length, tokenizer, facts, [(f"\n{name}: ", False), (answer, True)])


def variable_tracking(
    random: np.random.Generator, length: int, options: VariableTracking, tokenizer: Tokenizer
) -> Layout:
    """All variables that hold a number, by way of others (RULER, Hsieh et al., arXiv 2404.06654)."""
    names: set[str] = set()
    chains = [[_fresh(random, names).upper() for _ in range(options.hops + 1)] for _ in range(options.chains)]
    values = [str(value) for value in random.permutation(90_000)[: options.chains] + 10_000]
    waiting = [
        [f" VAR {chain[0]} = {value}. ", *(f" VAR {b} = VAR {a}. " for a, b in zip(chain, chain[1:], strict=False))]
        for chain, value in zip(chains, values, strict=True)
    ]
    facts = []
    while any(waiting):
        chosen = waiting[int(random.choice([i for i, rest in enumerate(waiting) if rest]))]
        facts.append(chosen.pop(0))
    asked = int(random.integers(options.chains))
    ending = [(f" Which variables hold {values[asked]}? ", False)]
    for name in chains[asked]:
        ending += [(name, True), (" ", False)]
    return haystack(random, length, tokenizer, facts, ending[:-1])


def thread_following(
    random: np.random.Generator, length: int, options: ThreadFollowing, tokenizer: Tokenizer
) -> Layout:
    """Where a thread of names ends (Roberts et al., arXiv 2411.05000); its links lie in any order."""
    names: set[str] = set()
    threads = [[_fresh(random, names) for _ in range(options.steps + 1)] for _ in range(options.threads)]
    links = [f" From {a} go to {b}. " for thread in threads for a, b in zip(thread, thread[1:], strict=False)]
    facts = [links[i] for i in random.permutation(len(links))]
    thread = threads[int(random.integers(options.threads))]
    ending = [(f" Starting from {thread[0]}, one ends at ", False), (thread[-1], True)]
    return haystack(random, length, tokenizer, facts, ending)


_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def _name(random: np.random.Generator) -> str:
    letters = zip(random.integers(0, len(_CONSONANTS), 3), random.integers(0, len(_VOWELS), 3), strict=True)
    return "".join(_CONSONANTS[c] + _VOWELS[v] for c, v in letters).capitalize()


def _fresh(random: np.random.Generator, names: set[str]) -> str:
    """A name that is not among `names`, which it joins; there are 343,000."""
    if len(names) > 200_000:
        raise TooShort("there are not enough names")
    while (name := _name(random)) in names:
        pass
    names.add(name)
    return name


TASKS = {
    "passkey": (passkey, Passkey),
    "phonebook": (phonebook, Phonebook),
    "variable_tracking": (variable_tracking, VariableTracking),
    "thread_following": (thread_following, ThreadFollowing),
}
