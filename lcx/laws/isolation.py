"""Isolation: documents in one row do not touch each other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lcx.laws.chunk import Chunk, Document
from lcx.laws.measure import Deviation, changed, deviation
from lcx.laws.subject import Pull, Subject


def isolation_bitwise(subject: Subject, chunk: Chunk, kept: Sequence[Document]) -> Deviation:
    """Form (i): the documents in `kept`, at most one a row, against the same row with all else replaced.

    Everything else is the other documents' tokens, and the incoming state where the kept document does not continue
    it. Outputs and gradients of the kept documents may not change by a bit, nor may the parameters' gradients from
    them; and a state that they do not continue gets no gradient.
    """
    inside, continued = _marks(chunk, kept)
    here = inside[:, :, None]
    dy = np.where(here, chunk.dy, 0)
    other_x = np.where(here, chunk.x, 1 - 2 * chunk.x)
    other_state = _where_row(subject, continued, chunk.state, jax.tree.map(lambda leaf: 1 - 2 * leaf, chunk.state))
    zero = jax.tree.map(np.zeros_like, chunk.dstate)
    results = []
    for x, state in ((chunk.x, chunk.state), (other_x, other_state)):
        pull = subject.pull(x, state, chunk.context, dy, zero)
        unused = _where_row(subject, continued, jax.tree.map(np.zeros_like, pull.state_gradient), pull.state_gradient)
        results.append(
            {
                "y": np.where(here, pull.y, 0),
                "params_gradient": pull.params_gradient,
                "x_gradient": pull.x_gradient,  # zero outside the kept documents, in both
                "state_gradient": pull.state_gradient,
                "x_gradient_elsewhere": np.where(here, 0, pull.x_gradient),
                "state_gradient_elsewhere": unused,
            }
        )
    found, expected = results
    for key in ("x_gradient_elsewhere", "state_gradient_elsewhere"):
        expected[key] = jax.tree.map(np.zeros_like, expected[key])
    return changed(found, expected)


def isolation_alone(subject: Subject, chunk: Chunk) -> Deviation:
    """Form (ii): a chunk against each of its documents alone, from the state that it continues or from an empty one.

    Compares the documents' outputs and gradients of inputs and states, and the sum of the parameters' gradients.
    """
    packed = subject.pull(chunk.x, chunk.state, chunk.context, chunk.dy)
    y, x_gradient = np.zeros_like(packed.y), np.zeros_like(packed.x_gradient)
    state_gradient = jax.tree.map(np.zeros_like, chunk.state)
    params_gradient = jax.tree.map(np.zeros_like, subject.params)
    for group in _same_length_groups(chunk):
        alone = _pull_alone(subject, chunk, group)
        params_gradient = jax.tree.map(np.add, params_gradient, alone.params_gradient)
        for index, document in enumerate(group):
            y[document.row, document.start : document.stop] = alone.y[index]
            x_gradient[document.row, document.start : document.stop] = alone.x_gradient[index]
            if document.continues:
                theirs = subject.take_rows(alone.state_gradient, np.full(len(chunk.x), index))
                here = np.arange(len(chunk.x)) == document.row
                state_gradient = _where_row(subject, here, theirs, state_gradient)
    names = ("y", "params_gradient", "x_gradient", "state_gradient")
    expected = dict(zip(names, (y, params_gradient, x_gradient, state_gradient), strict=True))
    return deviation({name: getattr(packed, name) for name in names}, expected)


def _same_length_groups(chunk: Chunk) -> list[list[Document]]:
    """The documents in groups of one length, at most as many as the chunk has rows."""
    by_length: dict[int, list[Document]] = {}
    for document in chunk.documents:
        by_length.setdefault(document.stop - document.start, []).append(document)
    rows = len(chunk.x)
    return [group[i : i + rows] for group in by_length.values() for i in range(0, len(group), rows)]


def _pull_alone(subject: Subject, chunk: Chunk, group: Sequence[Document]) -> Pull:
    """The documents of a group as rows of their own; rows without a document repeat the last one, with cotangent 0."""
    filled = [*group, *[group[-1]] * (len(chunk.x) - len(group))]
    cut = lambda array: np.stack([array[d.row, d.start : d.stop] for d in filled])  # noqa: E731
    rows = np.array([document.row for document in filled])
    continues = np.array([document.continues for document in filled])
    state = subject.take_rows(chunk.state, rows)
    state = _where_row(subject, continues, state, jax.tree.map(np.zeros_like, state))
    context = replace(
        chunk.context,
        positions=cut(chunk.context.positions),
        segment_ids=cut(chunk.context.segment_ids),
        length=np.where(continues, chunk.context.length[rows], 0),
    )
    real = (np.arange(len(chunk.x)) < len(group))[:, None, None]
    return subject.pull(cut(chunk.x), state, context, np.where(real, cut(chunk.dy), 0))


def _marks(chunk: Chunk, kept: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """bool [batch, time]: tokens of the kept documents; bool [batch]: the row's kept document continues the state."""
    inside = np.zeros(chunk.x.shape[:2], bool)
    continued = np.zeros(chunk.x.shape[:1], bool)
    for document in kept:
        inside[document.row, document.start : document.stop] = True
        continued[document.row] = document.continues
    return inside, continued


def _where_row(subject: Subject, rows: np.ndarray, chosen: Any, other: Any) -> Any:
    """Leaves of `chosen` in the marked rows, of `other` elsewhere."""

    def choose(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        shape = [1] * first.ndim
        shape[subject.batch_axis] = -1
        return np.where(rows.reshape(shape), first, second)

    return jax.tree.map(choose, chosen, other)
