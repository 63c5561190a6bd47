"""Causality: y[t] does not depend on x[s] for s > t."""

import jax
import numpy as np

from lcx.laws.chunk import Chunk
from lcx.laws.measure import Deviation, changed
from lcx.laws.subject import Subject


def causality(subject: Subject, chunk: Chunk, last: int) -> Deviation:
    """The gradient that outputs up to token `last` send to the tokens after it; nothing is allowed.

    Outputs are checked too: they must not move by a bit when the later tokens are replaced.
    """
    earlier = np.arange(chunk.x.shape[1])[None, :, None] <= last
    dy = np.where(earlier, chunk.dy, 0)
    dstate = jax.tree.map(np.zeros_like, chunk.dstate)
    before = subject.pull(chunk.x, chunk.state, chunk.context, dy, dstate)
    other = subject.pull(np.where(earlier, chunk.x, -chunk.x + 1), chunk.state, chunk.context, dy, dstate)
    leak = np.where(earlier, 0, before.x_gradient)
    moved = np.where(earlier, other.y - before.y, 0)
    zero = np.zeros_like(leak)
    return changed({"x_gradient": leak, "y": moved}, {"x_gradient": zero, "y": zero})
