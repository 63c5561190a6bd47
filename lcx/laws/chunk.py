"""Inputs that the laws are tried on: rows packed with documents, from a state that earlier tokens left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from lcx.laws.subject import Subject
from lcx.mixers import Context


@dataclass(frozen=True)
class Document:
    """A document's tokens in one row: [start, stop). `continues` where it goes on from the state."""

    row: int
    start: int
    stop: int
    continues: bool


@dataclass(frozen=True)
class Chunk:
    """A subject's input, the state before it, and cotangents for all its results; NumPy arrays throughout."""

    x: np.ndarray  # [batch, time, d_model]
    state: Any  # or None
    context: Context
    dy: np.ndarray  # [batch, time, d_model]
    dstate: Any
    documents: tuple[Document, ...]


def pack(
    subject: Subject,
    rows: Sequence[Sequence[int]],
    first_positions: Sequence[int],
    lengths: Sequence[int],
    padding: Sequence[int],
    seed: int,
) -> Chunk:
    """Random values in rows of documents.

    Args:
      subject: gives the widths and the dtype.
      rows: for each row the lengths of its documents, in order; every row has the same sum.
      first_positions: for each row the position of its first token; not 0 where the document goes on from the state.
      lengths: for each row how many tokens the incoming state holds.
      padding: for each row how many of its last documents are padding (segment 0).
      seed: of all values. The state is filled with random numbers, also beyond the tokens that it holds.
    """
    batch, time = len(rows), sum(rows[0])
    positions, segment_ids = np.zeros((2, batch, time), np.int32)
    documents = []
    for row, sizes in enumerate(rows):
        start = 0
        for number, size in enumerate(sizes):
            first = first_positions[row] if number == 0 else 0
            padded = number >= len(sizes) - padding[row]
            positions[row, start : start + size] = first + np.arange(size)
            segment_ids[row, start : start + size] = 0 if padded else number + 1
            documents.append(Document(row, start, start + size, continues=first > 0))
            start += size
    context = Context(positions, segment_ids, np.asarray(lengths, np.int32))
    x = jax.ShapeDtypeStruct((batch, time, subject.d_model), subject.dtype)
    random = np.random.default_rng(seed)
    fill = lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype)  # noqa: E731
    state = subject.draw_state(random, batch, max(lengths) + time)
    return Chunk(fill(x), state, context, fill(x), jax.tree.map(fill, state), tuple(documents))


def from_nothing(subject: Subject, chunk: Chunk) -> Chunk:
    """The same rows without a state before them. Their first documents begin there, whatever their positions say."""
    batch, time = chunk.x.shape[:2]
    shapes = jax.eval_shape(lambda: subject.init_state(batch, time))
    wave = lambda leaf: np.sin(np.arange(math.prod(leaf.shape), dtype=leaf.dtype)).reshape(leaf.shape)  # noqa: E731
    context = replace(chunk.context, length=np.zeros_like(chunk.context.length))
    return replace(chunk, state=None, context=context, dstate=jax.tree.map(wave, shapes))


def part(chunk: Chunk, start: int, stop: int, state: Any, dstate: Any) -> Chunk:
    """The tokens [start, stop) of a chunk, between the given state and cotangent."""
    context = chunk.context
    cut = replace(
        context,
        positions=context.positions[:, start:stop],
        segment_ids=context.segment_ids[:, start:stop],
        length=context.length + np.int32(start),
    )
    return Chunk(chunk.x[:, start:stop], state, cut, chunk.dy[:, start:stop], dstate, ())
