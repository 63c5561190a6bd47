"""What a local function may ask of the sequence that its shard is a part of.

Inside `parallel.kernels.Shard.kernel` a function sees one shard of every array. Where time is cut over devices, these
operations connect a shard with those before it; where it is not, the shard is the whole sequence, and they mean what
the words say. Shards are contiguous: shard r of R holds the tokens from r * time / R on.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lcx_kernels.residuals import keep

MeshAxis = str | tuple[str, ...]

_time_axis: contextvars.ContextVar[MeshAxis | None] = contextvars.ContextVar("time_axis", default=None)


@contextlib.contextmanager
def time_over(axis: MeshAxis | None) -> Iterator[None]:
    """Says over which mesh axis time is cut in the local function that is traced inside; None: it is whole."""
    token = _time_axis.set(axis)
    try:
        yield
    finally:
        _time_axis.reset(token)


def time_axis() -> MeshAxis | None:
    """The mesh axis that cuts time in the local function that is being traced; None where the shard has all of it."""
    return _time_axis.get()


def shift(tree: Any, axis: MeshAxis, distance: int, wrap: bool = False) -> Any:
    """What the shard `distance` places earlier holds; zeros where there is none, unless the shards form a ring."""
    count = jax.lax.axis_size(axis)
    hops = [(source, source + distance) for source in range(count)]
    pairs = [(source, target % count) for source, target in hops if wrap or target < count]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, axis, pairs), tree)


def before(x: jax.Array, tail: jax.Array | None, width: int) -> jax.Array | None:
    """The `width` tokens before this shard, [batch, width, ...]; see `halo`. The tail itself where it is everything."""
    axis = time_axis()
    return tail if axis is None else _before(x, tail, width, axis)


def halo(x: jax.Array, tail: jax.Array | None, width: int) -> tuple[jax.Array, jax.Array]:
    """The tokens before this shard, put in front of it.

    Args:
      x: [batch, time, ...].
      tail: [batch, width, ...], what came before the sequence; None where nothing did.
      width: how many tokens back the function looks; any number, also more than a shard has.

    Returns: (extended [batch, width + time, ...], where nothing came before the sequence zeros, or left out altogether
      where the shard is the whole of it; the tail [batch, width, ...] for what follows the sequence: its last tokens,
      zeros where there were fewer).
    """
    axis, time = time_axis(), x.shape[1]
    if axis is not None:
        extended = jnp.concatenate([_before(x, tail, width, axis), x], axis=1)
        return extended, last(extended[:, time:])
    if tail is None:
        missing = max(width - time, 0)
        padding = [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2)
        return x, jnp.pad(x[:, time - (width - missing) :], padding)
    extended = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return extended, extended[:, time:]


def _before(x: jax.Array, tail: jax.Array | None, width: int, axis: MeshAxis) -> jax.Array:
    """The `width` tokens before this shard: of its neighbours, as many as it takes, and of the tail before them."""
    time = x.shape[1]
    received, reach = [], 0
    for hop in range(1, min(-(-width // time), jax.lax.axis_size(axis) - 1) + 1):
        taken = min(time, width - reach)
        received.insert(0, keep(shift(x[:, time - taken :], axis, hop)))
        reach += taken
    missing = jnp.zeros_like(x, shape=(x.shape[0], width - reach, *x.shape[2:]))
    before = jnp.concatenate([missing, *received], axis=1)
    if tail is None:
        return before
    # Slot j is token start - width + j of the sequence; those before its first are slots start + j of the tail.
    start = jax.lax.axis_index(axis) * time
    padded = jnp.concatenate([tail.astype(x.dtype), jnp.zeros_like(before)], axis=1)
    moved = jax.lax.dynamic_slice_in_dim(padded, jnp.minimum(start, width), width, axis=1)
    carried = jnp.arange(width) < width - start
    return jnp.where(carried.reshape(-1, *[1] * (x.ndim - 2)), moved, before)


def last(tree: Any) -> Any:
    """What the last shard holds, on all of them."""
    axis = time_axis()
    if axis is None:
        return tree
    is_last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    return jax.tree.map(lambda array: jax.lax.psum(jnp.where(is_last, array, jnp.zeros_like(array)), axis), tree)


def gather(tree: Any) -> Any:
    """All shards' tokens, [batch, time, ...] each, on every shard."""
    axis = time_axis()
    if axis is None:
        return tree
    return jax.tree.map(lambda array: jax.lax.all_gather(array, axis, axis=1, tiled=True), tree)


def pass_state(
    summarize: Callable[[], Any],
    initial: Any,
    then: Callable[[Any, Any], Any],
    apply: Callable[[Any, Any], Any],
) -> Any:
    """The recurrent state that comes into this shard: the maps of all shards before it, applied to the initial state.

    Maps are composed in a number of exchanges that is logarithmic in the number of shards, and a map's size is that of
    a state, whatever the number of tokens (Blelloch 1990, "Prefix sums and their applications").

    Args:
      summarize: makes this shard's map of the state, a pytree of arrays; not called where the shard is everything.
      initial: the state before the sequence, a pytree of arrays; None is empty.
      then: (earlier map, later map) to the map of one after the other; associative.
      apply: (map, state) to the state after it; the state may be None.

    Returns: the state before this shard; `initial` itself where the shard is everything.
    """
    axis = time_axis()
    if axis is None:
        return initial
    index, count = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    before, distance = (
        keep(shift(summarize(), axis, 1)),
        1,
    )  # of no meaning on the first shard, which has none before it
    while distance < count - 1:
        composed = then(keep(shift(before, axis, distance)), before)
        before = _where(index > distance, composed, before)
        distance *= 2
    incoming = apply(before, initial)
    start = jax.tree.map(jnp.zeros_like, incoming) if initial is None else initial
    return _where(index == 0, start, incoming)


def _where(condition: jax.Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)
