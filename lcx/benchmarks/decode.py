"""Decoding beside transformers' `generate`, and at two lengths of context."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from flax import nnx

from lcx.benchmarks import peers
from lcx.benchmarks.harness import Result, Timing, ratio, seconds_of, take_turns
from lcx.benchmarks.models import make_batch, make_config
from lcx.models import LanguageModel
from lcx.models.generate import generate
from lcx.params import create

PROMPT, FAR, COUNT = 2048, 65_536, 64  # tokens of the prompts, and how many are written
CHUNK = 2048  # tokens of a prompt that are read at once
NAMES = {"transformer": "Llama", "mamba": "Mamba"}


def decode_results(rounds: int) -> list[Result]:
    """Milliseconds a token at batch 1, without the prompt."""
    results = []
    if peers.available("torch", "transformers"):
        results += [beside(family, rounds) for family in NAMES]
    return results + [at_length(family, rounds) for family in ("mamba", "samba")]


def our_model(family: str) -> LanguageModel:
    """With drawn parameters."""
    config = make_config(family, 1, PROMPT).model
    graphdef, params = create(lambda: LanguageModel(config, nnx.Rngs(0)))
    return nnx.merge(graphdef, params)


def decoder(family: str, prompt: int) -> Callable[[int], list[int]]:
    """As `peers.decoder`."""
    model, tokens = our_model(family), make_batch(1, prompt)["tokens"]

    def decode(count: int) -> list[int]:
        return [int(token[0]) for token in generate(model, tokens, count, temperature=0.0, chunk_size=CHUNK)]

    return decode


def beside(family: str, rounds: int) -> Result:
    """COUNT tokens after the first one, which ends the prompt: what COUNT + 1 take, less what one takes."""
    contestants = {}
    for name, decode in (("ours", decoder(family, PROMPT)), ("theirs", peers.decoder(family, PROMPT))):
        contestants |= {f"{name} many": partial(decode, COUNT + 1), f"{name} one": partial(decode, 1)}
    timings = take_turns(contestants, rounds)
    each = {name: difference(timings[f"{name} many"], timings[f"{name} one"]) for name in ("ours", "theirs")}
    value = ratio(each["theirs"], each["ours"])
    what = f"{family}, batch 1, after a prompt of {PROMPT:,}: tokens/s over transformers' generate ({NAMES[family]})"
    return Result(what, value, "x", "at least 3", value >= 3, seconds_of(each))


def difference(whole: Timing, part: Timing) -> Timing:
    """Seconds a token of what `whole` does beyond `part`, round by round."""
    return Timing(tuple((a - b) / COUNT for a, b in zip(whole.seconds, part.seconds, strict=True)))


def at_length(family: str, rounds: int) -> Result:
    """The same model after a short and a long context, in turns; their prompts are read once, before the clock."""
    going = {f"after {prompt}": endless(family, prompt, (rounds + 1) * COUNT + 1) for prompt in (PROMPT, FAR)}
    timings = take_turns({name: partial(some, tokens) for name, tokens in going.items()}, rounds)
    growth = ratio(timings[f"after {FAR}"], timings[f"after {PROMPT}"])
    what = f"{family}: time a token after {FAR:,} tokens over that after {PROMPT:,}"
    return Result(what, growth, "x", "0.95 to 1.05", 0.95 <= growth <= 1.05, seconds_of(timings))


def endless(family: str, prompt: int, count: int) -> Iterator[np.ndarray]:
    """Tokens after a prompt that has been read."""
    tokens = generate(our_model(family), make_batch(1, prompt)["tokens"], count, temperature=0.0, chunk_size=CHUNK)
    next(tokens)
    return tokens


def some(tokens: Iterator[np.ndarray]) -> list[np.ndarray]:
    """The next COUNT of them."""
    return [next(tokens) for _ in range(COUNT)]
