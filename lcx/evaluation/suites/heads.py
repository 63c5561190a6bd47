"""Retrieval heads: which heads copy what is asked for, and whether the model needs them (Wu et al., arXiv 2404.15574).

While the model writes the answer that stands somewhere in its context, a head gets credit for a token if what it
attends to most is that token, where the answer stands. A head's score is the share of the answer's tokens that it gets
credit for, averaged over samples that the model solves. The check: with the best heads masked the model fails, with as
many others masked it does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcx.errors import UserError
from lcx.evaluation.observe import observed
from lcx.evaluation.streaming import stream
from lcx.evaluation.suite import Example, Finding, Grid, Material
from lcx.evaluation.suites import passkey
from lcx.models import LanguageModel
from lcx.schema import limited

THRESHOLD = 0.1  # a retrieval head's score


@dataclass(frozen=True)
class Options:
    """What is asked, and how many heads are masked."""

    length: int | None = limited(None, minimum=16)  # tokens of a passkey example; None: of training
    samples: int = limited(20, minimum=1)
    digits: int | None = limited(5, minimum=1, maximum=18)
    style: str = "landmark"
    masked: int | None = limited(None, minimum=1)  # heads; None: those above the threshold, at least one
    trials: int = limited(3, minimum=1)  # random choices of as many other heads
    seed: int = limited(0, minimum=0)
    chunk_size: int = limited(256, minimum=1)  # tokens whose attention weights exist at once


Head = tuple[str, str, int, int]  # layer, mixer, period, head


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields the share of retrieval heads, grids of scores, and the accuracy with heads masked."""
    asked = {"length": options.length or material.train_length, "digits": options.digits, "style": options.style}
    examples = material.examples("passkey", asked, options.samples)
    right = passkey.answer(model, examples, material)
    yield "accuracy", float(np.mean(right))
    solved = [example for example, found in zip(examples, right, strict=True) if found]
    yield "solved_samples", float(len(solved))
    if not solved:
        return  # heads that copy nothing have no score
    scores = head_scores(observed(model), solved, options.chunk_size)
    flat = {(*layer, *place): float(score) for layer, grid in scores.items() for place, score in np.ndenumerate(grid)}
    values = np.array(list(flat.values()))
    yield "share_of_retrieval_heads", float(np.mean(values > THRESHOLD))
    yield "share_of_heads_without_score", float(np.mean(values == 0))
    for (key, _), grid in scores.items():
        labels = [list(range(size)) for size in grid.shape]
        yield f"retrieval score of {key}", Grid(*labels, grid.tolist(), "period", "head", "score")
    ranked = sorted(flat, key=lambda head: -flat[head])
    count = min(options.masked or max(1, int(np.sum(values > THRESHOLD))), len(ranked))
    yield "masked_heads", float(count)
    accuracy = lambda heads: float(np.mean(passkey.answer(mask(model, heads), solved, material)))  # noqa: E731
    yield "accuracy_on_solved_without_best_heads", accuracy(ranked[:count])
    others, random = ranked[count:], np.random.default_rng(options.seed)
    if len(others) >= count:
        drawn = [[others[i] for i in random.permutation(len(others))[:count]] for _ in range(options.trials)]
        yield "accuracy_on_solved_without_random_heads", float(np.mean([accuracy(heads) for heads in drawn]))


def head_scores(
    model: LanguageModel, examples: Sequence[Example], chunk_size: int
) -> dict[tuple[str, str], np.ndarray]:
    """The mean retrieval score of each head, [periods, heads] by (layer, mixer), over examples of one length.

    Each example ends in its answer, which greedy writing gives. Raises UserError for a model without attention.
    """
    rows = np.stack([example.tokens for example in examples])
    distances: dict[tuple[str, str], list] = {}
    for piece in stream(model, rows, chunk_size, score=False):
        width = min(chunk_size, rows.shape[1] - 1 - piece.start)
        for key, mixers in piece.metrics.items():
            for name, metrics in mixers.items():
                if "distance" in metrics:
                    distances.setdefault((key, name), []).append(np.asarray(metrics["distance"])[:, :, :width])
    if not distances:
        raise UserError("the suite heads looks at attention, and this model has none.")
    scores = {}
    for layer, found in distances.items():
        joined = np.concatenate(found, axis=2)  # [periods, batch, time, heads]
        by_example = [credit(example, joined[:, row]) for row, example in enumerate(examples)]
        scores[layer] = np.mean(by_example, axis=0)
    return scores


def credit(example: Example, distances: np.ndarray) -> np.ndarray:
    """The share of the answer's tokens that each head of an example gets credit for.

    distances: int [periods, time, heads], how far back each query's largest weight lies. Returns [periods, heads].
    """
    answer = np.flatnonzero(example.answers)
    standing = where_it_stands(example.tokens[: answer[0]], example.tokens[answer])
    queries = answer - 1  # what is written at a place is decided at the one before
    places = queries[:, None] - distances[:, queries]  # [periods, answer, heads]
    copied = example.tokens[places] == example.tokens[answer][:, None]
    return np.mean(copied & np.isin(places, standing), axis=1)


def where_it_stands(context: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """All places of the answer's tokens in a context."""
    windows = np.lib.stride_tricks.sliding_window_view(context, len(answer))
    starts = np.flatnonzero((windows == answer).all(axis=1))
    return np.unique(starts[:, None] + np.arange(len(answer)))


def mask(model: LanguageModel, heads: Sequence[Head]) -> LanguageModel:
    """The model without what these heads write into the stream."""
    model = nnx.clone(model)
    for key, name, period, head in heads:
        weight = model.stack.layers[key].mixers[name].output.weight
        weight[...] = jnp.asarray(weight[...]).at[period, head].set(0)
    return model
