"""Documents that share a chunk, kept apart even where numbers are not finite.

A product over a chunk has factors of 0 for what a token must not see, and 0 times NaN is NaN. So what is not finite is
replaced before the products, and NaN is selected into all that it would have reached inside its own document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.arguments import spread
from lcx_kernels.chunked_memory.state import SegmentState

LOWEST = -1e30  # of a log-decay: sums of these over a chunk stay finite, and its factor is 0 all the same


class Tokens(NamedTuple):
    """What `arguments.Arguments` has per token."""

    q: jax.Array | None
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None


class Marks(NamedTuple):
    """Borders of segments and of documents, bool [batch, time] or None."""

    closes: jax.Array | None
    reset: jax.Array | None


class Spoilt(NamedTuple):
    """Where a number that is not finite is, or has reached; bool."""

    q: jax.Array | None  # [batch, time, q heads], the query itself
    read: jax.Array  # [batch, time, S], what the token reads, or its own write
    memory: jax.Array  # [batch, S], the final memory and normaliser
    open_memory: jax.Array | None  # [batch, S], those of the open segment


def cleaned(tokens: Tokens, marks: Marks, exclusive: bool) -> tuple[Tokens, Spoilt]:
    """The tokens with finite numbers alone, and what the others spoil."""
    heads = max(tokens.k.shape[2], tokens.v.shape[2])
    q, k, v, log_decay, beta = tokens
    bad = {name: _bad(array) for name, array in (("q", q), ("k", k), ("v", v)) if array is not None}
    written = spread(bad["k"], heads) | spread(bad["v"], heads)
    if log_decay is not None:
        wrong = jnp.isnan(log_decay) | (log_decay == jnp.inf)
        written |= wrong.any(axis=-1) if log_decay.ndim == 4 else wrong
        log_decay = jnp.where(wrong, 0, jnp.maximum(log_decay, LOWEST))
    if beta is not None:
        written |= ~jnp.isfinite(beta)
        beta = jnp.where(jnp.isfinite(beta), beta, 0)
    q, k, v = (
        None if array is None else jnp.where(bad[name][..., None], 0, array)
        for name, array in (("q", q), ("k", k), ("v", v))
    )
    return Tokens(q, k, v, log_decay, beta), _spoilt(bad.get("q"), written, marks, exclusive)


def _bad(array: jax.Array) -> jax.Array:
    return ~jnp.isfinite(array).all(axis=-1)


def _index(array: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, array.shape, 1)


def _starts(reset: jax.Array | None, like: jax.Array) -> jax.Array:
    """int32, broadcastable to ``like`` [batch, time, S]: the first token of each token's document."""
    if reset is None:
        return jnp.zeros_like(like, jnp.int32)
    return jax.lax.cummax(jnp.where(reset, _index(reset), 0), axis=1)[..., None]


def _spoilt(q: jax.Array | None, written: jax.Array, marks: Marks, exclusive: bool) -> Spoilt:
    start = _starts(marks.reset, written)
    latest = jax.lax.cummax(jnp.where(written, _index(written), -1), axis=1)  # the last bad write up to each token
    if marks.closes is None:
        reached = latest >= start
        return Spoilt(q, reached, reached[:, -1], None)
    opens = jnp.pad(marks.closes[:, :-1], ((0, 0), (1, 0)))
    opens = opens if marks.reset is None else opens | marks.reset
    earlier = jnp.pad(latest[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=-1)
    # The last bad write in a segment before each token's own.
    complete = jax.lax.cummax(jnp.where(opens[..., None], earlier, -1), axis=1)
    final = jnp.where(marks.closes[:, -1:], latest[:, -1], complete[:, -1])
    read = (complete if exclusive else latest) >= start
    return Spoilt(q, read, final >= start[:, -1], jnp.maximum(start[:, -1] - 1, final) < latest[:, -1])


def to_heads(marks: jax.Array, heads: int) -> jax.Array:
    """Marks [batch, time, n] for other heads: for each of more, those of its group; for each of fewer, any of its."""
    if heads >= marks.shape[2]:
        return spread(marks, heads)
    return marks.reshape(*marks.shape[:2], heads, -1).any(axis=-1)


def spoil_out(out: jax.Array | None, spoilt: Spoilt) -> jax.Array | None:
    """NaN into the outputs [batch, time, heads, V] that are reached."""
    if out is None:
        return None
    reached = to_heads(spoilt.read, out.shape[2])
    if spoilt.q is not None:
        reached |= to_heads(spoilt.q, out.shape[2])
    return jnp.where(reached[..., None], jnp.nan, out)


def spoil_state(state: SegmentState, spoilt: Spoilt) -> SegmentState:
    """NaN into the parts of the state that are reached."""
    reached = SegmentState(spoilt.memory, spoilt.memory, spoilt.open_memory, spoilt.open_memory)
    return SegmentState(
        *(
            None if part is None else jnp.where(marks.reshape(*marks.shape, *[1] * (part.ndim - 2)), jnp.nan, part)
            for part, marks in zip(state, reached, strict=True)
        )
    )


def clean_gradient(d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient of the outputs with finite numbers alone, and bool [batch, time, heads] where it had others."""
    bad = _bad(d_out)
    return jnp.where(bad[..., None], 0, d_out), bad


def spoil_gradients(
    gradients: Tokens, d_state: SegmentState, bad: jax.Array, spoilt: Spoilt, marks: Marks
) -> tuple[Tokens, SegmentState]:
    """NaN into the gradients that ``bad`` gradients of outputs, [batch, time, heads], reach, and of spoilt tokens."""
    heads, time = spoilt.read.shape[2], bad.shape[1]
    written = to_heads(bad, heads)
    index = _index(written)
    following = jax.lax.cummin(jnp.where(written, index, time), axis=1, reverse=True)  # the next bad one from here on
    if marks.reset is None:
        end = first_end = time
    else:
        ends = jax.lax.cummin(jnp.where(marks.reset, _index(marks.reset), time), axis=1, reverse=True)
        first_end = ends[:, :1]
        end = jnp.pad(ends[:, 1:], ((0, 0), (0, 1)), constant_values=time)[..., None]
    reached = (following < end) | spoilt.read
    own = {"q": written | spoilt.read}
    changed = []
    for name, gradient in gradients._asdict().items():
        if gradient is None:
            changed.append(None)
            continue
        marked = to_heads(own.get(name, reached), gradient.shape[2])
        if name == "q" and spoilt.q is not None:
            marked |= spoilt.q
        changed.append(jnp.where(marked.reshape(*marked.shape, *[1] * (gradient.ndim - 3)), jnp.nan, gradient))
    before = following[:, 0] < first_end
    state_marks = Spoilt(None, spoilt.read, before, before)
    return Tokens(*changed), spoil_state(d_state, state_marks)
