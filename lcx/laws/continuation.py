"""Continuation: f(a ++ b) = f(a), then f(b) from the state that a left, gradients included."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import numpy as np

from lcx.laws.chunk import Chunk, from_nothing, part
from lcx.laws.measure import Deviation, deviation
from lcx.laws.subject import Pull, Subject


def continuation(subject: Subject, chunk: Chunk, lengths: Sequence[int]) -> Deviation:
    """The whole chunk against its parts of the given lengths, run one after the other from the chunk's state.

    Compares outputs, the final state and the gradients of inputs, parameters and the state at the start; cotangents
    reach the earlier parts through the states between.
    """
    borders = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    spans = list(pairwise(borders))
    zero = jax.tree.map(np.zeros_like, chunk.dstate)
    states = [chunk.state]
    for start, stop in spans[:-1]:
        piece = part(chunk, start, stop, states[-1], zero)
        states.append(subject.pull(piece.x, piece.state, piece.context, piece.dy, zero).state)
    dstate, pulls = chunk.dstate, []
    for (start, stop), state in zip(reversed(spans), reversed(states), strict=True):
        piece = part(chunk, start, stop, state, dstate)
        pulls.insert(0, subject.pull(piece.x, piece.state, piece.context, piece.dy, dstate))
        dstate = pulls[0].state_gradient
    whole = subject.pull(chunk.x, chunk.state, chunk.context, chunk.dy, chunk.dstate)
    return deviation(_joined(pulls), _joined([whole]))


def empty_state(subject: Subject, chunk: Chunk) -> Deviation:
    """A chunk from state None against the same chunk from `init_state`: both mean that nothing came before."""
    chunk = from_nothing(subject, chunk)
    empty = jax.device_get(subject.init_state(*chunk.x.shape[:2]))
    from_none, from_empty = (
        subject.pull(chunk.x, state, chunk.context, chunk.dy, chunk.dstate) for state in (None, empty)
    )
    pick = lambda pull: _joined([pull]) | {"state_gradient": {}}  # noqa: E731
    return deviation(pick(from_none), pick(from_empty))


def _joined(pulls: Sequence[Pull]) -> dict:
    """The results of consecutive parts as those of one chunk."""
    return {
        "y": np.concatenate([pull.y for pull in pulls], axis=1),
        "state": pulls[-1].state,
        "params_gradient": jax.tree.map(lambda *leaves: sum(leaves), *[pull.params_gradient for pull in pulls]),
        "x_gradient": np.concatenate([pull.x_gradient for pull in pulls], axis=1),
        "state_gradient": pulls[0].state_gradient,
    }
