"""Documents that share a chunk, kept apart even where numbers are not finite.

A product over a chunk has factors of 0 for what a token must not see, and 0 times NaN is NaN. So what is not finite is
replaced before the products, and NaN is selected into all that it would have reached inside its own document.
"""

import functools
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


def cleaned(tokens: Tokens, marks: Marks, state: SegmentState, exclusive: bool) -> tuple[Tokens, SegmentState, Spoilt]:
    """Tokens and initial state with finite numbers alone, and what the others spoil."""
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
    state, initially, open_initially = clean_state(state)
    spoilt = _spoilt(bad.get("q"), written, marks, initially, open_initially, exclusive)
    return Tokens(q, k, v, log_decay, beta), state, spoilt


def clean_state(state: SegmentState) -> tuple[SegmentState, jax.Array, jax.Array]:
    """The state with finite numbers alone, and bool [batch, S] where it had others, and where its open parts had."""

    def bad(*parts: jax.Array | None) -> jax.Array:
        marks = [~jnp.isfinite(part).all(axis=tuple(range(2, part.ndim))) for part in parts if part is not None]
        return functools.reduce(jnp.logical_or, marks, jnp.zeros(state.memory.shape[:2], bool))

    clean = jax.tree.map(lambda part: jnp.where(jnp.isfinite(part), part, 0), state)
    return clean, bad(*state[:2]), bad(*state[2:])


def _bad(array: jax.Array) -> jax.Array:
    return ~jnp.isfinite(array).all(axis=-1)


def _index(array: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, array.shape, 1)


def _starts(reset: jax.Array | None, like: jax.Array) -> jax.Array:
    """int32, broadcastable to ``like`` [batch, time, S]: each token's document's first token, -1 before the block."""
    if reset is None:
        return jnp.full((1, like.shape[1], 1), -1, jnp.int32)
    return jax.lax.cummax(jnp.where(reset, _index(reset), -1), axis=1)[..., None]


def _spoilt(q, written, marks: Marks, initially, open_initially, exclusive: bool) -> Spoilt:
    """What ``written`` [batch, time, S] and parts of the initial state [batch, S] spoil; none, -2, or the last of them.

    The initial state counts as written at -1, where a document that goes on starts.
    """
    start = _starts(marks.reset, written)
    head = jnp.where(initially, -1, -2)[:, None]
    latest = jnp.maximum(jax.lax.cummax(jnp.where(written, _index(written), -2), axis=1), head)
    if marks.closes is None:
        reached = latest >= start
        return Spoilt(q, reached, reached[:, -1], None)
    open_head = jnp.maximum(head, jnp.where(open_initially, -1, -2)[:, None])
    latest_open = jnp.maximum(latest, open_head)
    opens = jnp.pad(marks.closes[:, :-1], ((0, 0), (1, 0)))
    opens = opens if marks.reset is None else opens | marks.reset
    earlier = jnp.concatenate([open_head, latest_open[:, :-1]], axis=1)
    # The last of a segment before the token's own.
    complete = jnp.maximum(jax.lax.cummax(jnp.where(opens[..., None], earlier, -2), axis=1), head)
    final = jnp.where(marks.closes[:, -1:], latest_open[:, -1], complete[:, -1])
    read = (complete if exclusive else latest_open) >= start
    start, latest_open = start[:, -1], latest_open[:, -1]
    # What is open at the end began where a segment was completed last, or with the document.
    begin = jax.lax.cummax(jnp.where(opens, _index(opens), -1), axis=1)[:, -1:]
    is_open = (latest_open >= jnp.maximum(begin, start)) & ~marks.closes[:, -1:]
    return Spoilt(q, read, final >= start, is_open)


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
    gradients: Tokens,
    d_state: SegmentState,
    bad: jax.Array | None,
    finally_bad: jax.Array,
    spoilt: Spoilt,
    marks: Marks,
) -> tuple[Tokens, SegmentState]:
    """NaN into the gradients that bad gradients of outputs, [batch, time, heads], and of the final state, [batch, S],
    reach, and into those of spoilt tokens."""
    batch, time, heads = spoilt.read.shape
    read = jnp.zeros_like(spoilt.read) if bad is None else to_heads(bad, heads)
    following = jax.lax.cummin(jnp.where(read, _index(read), time + 1), axis=1, reverse=True)
    following = jnp.minimum(following, jnp.where(finally_bad, time, time + 1)[:, None])  # the next from here on
    ends = jnp.full((batch, time + 1), time + 1, jnp.int32)  # the next reset from here on
    if marks.reset is not None:
        ends = jnp.where(jnp.pad(marks.reset, ((0, 0), (0, 1))), _index(ends), time + 1)
        ends = jax.lax.cummin(ends, axis=1, reverse=True)
    reached = (following < ends[:, 1:, None]) | spoilt.read
    changed = {}
    for name, gradient in gradients._asdict().items():
        if gradient is not None:
            marked = to_heads(read | spoilt.read if name == "q" else reached, gradient.shape[2])
            if name == "q" and spoilt.q is not None:
                marked |= spoilt.q
            gradient = jnp.where(marked.reshape(*marked.shape, *[1] * (gradient.ndim - 3)), jnp.nan, gradient)
        changed[name] = gradient
    before = following[:, 0] < ends[:, :1]
    return Tokens(**changed), spoil_state(d_state, Spoilt(None, spoilt.read, before, before))
