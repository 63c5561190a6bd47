"""The tokens of an example while it is put together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lcx.data.tokenizers import Tokenizer


class TooShort(Exception):
    """There is no room for an example; the message says for what."""


@dataclass
class Layout:
    """Tokens, and the answer that each belongs to; see lcx.data.synthetic.task.Example."""

    tokens: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    accepted: dict[int, frozenset[int]] = field(default_factory=dict)
    count: int = 0  # of answers

    def add(self, tokens: Iterable[int], answer: bool = False) -> "Layout":
        """Adds tokens: of the problem, or one whole answer."""
        tokens = [int(token) for token in tokens]
        self.count += answer
        self.tokens += tokens
        self.answers += [self.count if answer else 0] * len(tokens)
        return self

    def padded(self, length: int, token: int) -> "Layout":
        """The same with `token` in front, so that it has `length` tokens. Raises TooShort where it has more."""
        missing = length - len(self.tokens)
        if missing < 0:
            raise TooShort(f"there is no room for an example of {len(self.tokens)} tokens")
        accepted = {place + missing: tokens for place, tokens in self.accepted.items()}
        return Layout([token] * missing + self.tokens, [0] * missing + self.answers, accepted, self.count)


FILLER = (
    "The river runs past the mill and under the old bridge. Carts go by in the morning and come back at night. "
    "In winter the road is white and nobody hurries. The baker opens early, the smith a little later. "
    "When the wind turns, the sails of the mill turn with it. "
)


def encode(tokenizer: Tokenizer, words: str) -> list[int]:
    """The tokens of a text, without a start token."""
    return tokenizer.encode(words)[0 if tokenizer.start_token is None else 1 :].tolist()


def haystack(
    random: np.random.Generator,
    length: int,
    tokenizer: Tokenizer,
    facts: Sequence[str],
    ending: Sequence[tuple[str, bool]],
    filler: str = FILLER,
    beginning: str = "",
    depth: float | None = None,
) -> Layout:
    """Facts, in their order, in a text that says nothing, then an ending: (text, is an answer).

    They stand at random places, or at a depth: 0 is before the text, 1 after it. The text begins anywhere in `filler`,
    which is repeated, after `beginning`. There are exactly `length` tokens. Raises TooShort.
    """
    first = encode(tokenizer, beginning) if beginning else []
    end = [(encode(tokenizer, words), answer) for words, answer in ending]
    pieces = [encode(tokenizer, fact) for fact in facts]
    room = length - len(first) - sum(map(len, pieces)) - sum(len(tokens) for tokens, _ in end)
    if room < 0:
        raise TooShort("there is no room for the facts and the question")
    words = encode(tokenizer, filler)
    text = np.roll(np.resize(words, room), -int(random.integers(len(words)))).tolist() if room else []
    places = np.sort(random.integers(0, room + 1, len(pieces))).tolist()
    if depth is not None:
        places = [round(depth * room)] * len(pieces)
    layout, done = Layout().add(first), 0
    for place, piece in zip(places, pieces, strict=True):
        layout.add(text[done:place]).add(piece)
        done = place
    layout.add(text[done:])
    for tokens, answer in end:
        layout.add(tokens, answer)
    return layout
