"""What a stretch of tokens does to the state of a chunked memory, without its outputs.

Devices that hold consecutive stretches of time summarise them side by side, compose the summaries, and then each runs
from the right state. The map of the state is affine; with S heads a memory each,

    linear         M' = decay M + M0                  decay a number a head or a key channel
    delta_rule     M' = A M + M0                      A [K, K]
    segment_delta  (M, O)' = A (M, O) + (M0, O0)      A [2K, 2K], O the open segment's

and that of normalisers as for linear. The map of segment_delta depends on the normaliser that the stretch finds, so
there it takes two phases: `chunked_memory_summary` of every stretch without ``normalizers`` gives the maps of
normalisers, and with those that a stretch finds the whole map.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.checks import check
from lcx_kernels.chunked_memory.api import check_static, gather
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.choice import choose
from lcx_kernels.chunked_memory.state import PRECISION, SegmentState, canonical


class MemorySummary(NamedTuple):
    """The map of the state that a stretch of tokens makes; `apply` it, or compose it `then` with the next.

    Attributes:
      reset: bool [batch], whether a reset lies in the stretch, so that nothing of the initial state survives.
      closed: bool [batch], whether the segment that was open at the start is complete at the end; None where segments
        do not matter, or are not kept open.
      log_decay: [batch, S, 1 or K], the sum of log-decays, of no meaning where reset; None for no decay.
      transition: [batch, S, K, K] or [batch, S, 2K, 2K], exactly 0 where reset; None where the map is a decay.
      state: the final state of the stretch started from nothing; None where the map of a part is not known.
    """

    reset: jax.Array
    closed: jax.Array | None
    log_decay: jax.Array | None
    transition: jax.Array | None
    state: SegmentState

    def apply(self, state: Any) -> Any:
        """The state after the stretch, given that before it, in a form that `chunked_memory` returns.

        Of a summary without the memories' map (the first phase of segment_delta) only normalisers come back, in a
        `SegmentState`, or as (None, z) where segments are not kept open.
        """
        given = canonical(state)
        after = self._apply(given)
        if isinstance(state, SegmentState):
            return after
        return (after.memory, after.normalizer) if isinstance(state, tuple) else after.memory

    def then(self, later: "MemorySummary") -> "MemorySummary":
        """The summary of this stretch followed by ``later``. Of segment_delta, that of the same phase."""
        both = lambda one, other, join: None if one is None else join(one, other)  # noqa: E731
        return MemorySummary(
            reset=self.reset | later.reset,
            closed=both(self.closed, later.closed, jnp.logical_or),
            log_decay=both(self.log_decay, later.log_decay, jnp.add),
            transition=both(later.transition, self.transition, _product),
            state=later._apply(self.state),
        )

    def _apply(self, given: SegmentState) -> SegmentState:
        if self.transition is None:
            memory, open_memory = self._decayed(given.memory, given.open_memory, self.state.memory)
        elif self.closed is None:
            memory, open_memory = _product(self.transition, self._surviving(given.memory)), None
        else:
            joined = jnp.concatenate([given.memory, given.open_memory], axis=2)
            memory, open_memory = jnp.split(_product(self.transition, self._surviving(joined)), 2, axis=2)
        normalizer, open_normalizer = self._decayed(given.normalizer, given.open_normalizer, self.state.normalizer)
        carried = SegmentState(memory, normalizer, open_memory, open_normalizer)
        return SegmentState(
            *(None if own is None else own + part for own, part in zip(self.state, carried, strict=True))
        )

    def _decayed(self, whole, opened, wanted) -> tuple[jax.Array | None, jax.Array | None]:
        """What is left of a complete and an open part [batch, S, K, ...]."""
        if wanted is None:
            return None, None

        def left(part: jax.Array) -> jax.Array:
            part = self._surviving(part)
            if self.log_decay is None:
                return part
            decay = jnp.exp(self.log_decay)
            return self._surviving(part * decay.reshape(*decay.shape, *[1] * (part.ndim - 3)))

        if self.closed is None:
            return left(whole), None
        closed = self.closed.reshape(-1, *[1] * (whole.ndim - 1))
        return left(jnp.where(closed, whole + opened, whole)), left(jnp.where(closed, 0, opened))

    def _surviving(self, part: jax.Array) -> jax.Array:
        """By selection, so that not even a NaN passes a reset."""
        return jnp.where(self.reset.reshape(-1, *[1] * (part.ndim - 1)), 0, part)


def chunked_memory_summary(
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    normalize: bool = False,
    update: str = "linear",
    read: str = "inclusive",
    chunk_size: int,
    positions: jax.Array | None = None,
    reset: jax.Array | None = None,
    normalizers: Any = None,
    backend: str = "auto",
) -> MemorySummary:
    """What `chunked_memory` of the same arguments does to the state: cheaper, and it needs no initial state.

    Args, dtypes and errors as in `chunked_memory`, and
      normalizers: for segment_delta, the normalisers that the stretch finds: (z, that of the open segment), each
        [batch, S, K], or z alone where positions are not given. None for the first phase: the map of normalisers alone.
      backend: "auto" is "xla" where a platform's own kernel wants queries.
    """
    static = check_static(update, read, normalize, chunk_size, log_decay, beta)
    if normalizers is not None and update != "segment_delta":
        raise ValueError(f'normalizers: given with update="{update}", expected with "segment_delta" alone')
    arguments = gather(None, k, v, log_decay, beta, positions, reset, None, static)
    opened = static.segmented and positions is not None
    any_reset = jnp.zeros_like(k[:, 0, 0, 0], dtype=bool) if reset is None else reset.any(axis=1)
    closed = arguments.closes.any(axis=1) if opened else None

    def final(arguments: Arguments, static: Static) -> SegmentState:
        _, state = choose(backend, arguments, static)(arguments, static)
        return state if opened else state.total()

    if update == "delta_rule":
        return MemorySummary(any_reset, None, None, *_affine(arguments, static, final, opened))
    if update == "segment_delta":
        state = None if normalizers is None else _with_normalizers(arguments.state, normalizers, opened)
        sums = final(*_of_normalizers(arguments, static))._replace(memory=None, open_memory=None)
        if state is None:
            return MemorySummary(any_reset, closed, None, None, sums)
        transition, state = _affine(arguments._replace(state=state), static, final, opened)
        state = state._replace(normalizer=sums.normalizer, open_normalizer=sums.open_normalizer)
        return MemorySummary(any_reset, closed, None, transition, state)
    total = None
    if log_decay is not None:
        total = jnp.sum(arguments.log_decay.astype(arguments.dtype), axis=1)
        total = total if total.ndim == 3 else total[..., None]
    return MemorySummary(any_reset, closed, total, None, final(arguments, static))


def _of_normalizers(arguments: Arguments, static: Static) -> tuple[Arguments, Static]:
    """The call whose normalisers are those of segment_delta; a value of one number stands for what is not wanted."""
    state = arguments.state
    thin = state._replace(memory=state.memory[..., :1], open_memory=state.open_memory[..., :1])
    arguments = arguments._replace(v=jnp.zeros_like(arguments.v[..., :1]), state=thin)
    return arguments, static._replace(update="linear", read="exclusive")


def _with_normalizers(state: SegmentState, given: Any, opened: bool) -> SegmentState:
    if isinstance(given, tuple) != opened:
        raise ValueError(f"normalizers: expected {'(complete, open)' if opened else 'one array'}")
    z, open_z = given if opened else (given, None)
    for name, array in (("normalizers", z), ("normalizers of the open segment", open_z)):
        check(name, array, "[batch, S, K]", *state.normalizer.shape)
    cast = lambda array, default: default if array is None else array.astype(default.dtype)  # noqa: E731
    return state._replace(normalizer=cast(z, state.normalizer), open_normalizer=cast(open_z, state.open_normalizer))


def _affine(arguments: Arguments, static: Static, final: Callable, opened: bool) -> tuple[jax.Array, SegmentState]:
    """The transition, and the final state started from nothing.

    Both are from one call with more values: each memory has columns that start as the unit matrix, to which nothing is
    written but what the update makes of themselves.
    """
    v, state, K = arguments.v, arguments.state, arguments.k.shape[3]
    V, parts = v.shape[3], 2 if opened else 1
    unit = jnp.zeros_like(state.memory[..., :1]) + jnp.eye(K, dtype=state.memory.dtype)
    zeros = jnp.zeros_like(unit)
    beside = lambda part, *columns: jnp.concatenate([part, *columns[:parts]], axis=-1)  # noqa: E731
    wide = state._replace(memory=beside(state.memory, unit, zeros))
    if static.segmented:
        wide = wide._replace(open_memory=beside(state.open_memory, zeros, unit))
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, parts * K)])
    found = final(arguments._replace(v=v, state=wide), static)
    rows = [found.memory, found.open_memory][:parts]
    transition = jnp.concatenate([part[..., V:] for part in rows], axis=2)
    open_memory = found.open_memory[..., :V] if opened else None
    return transition, found._replace(memory=found.memory[..., :V], open_memory=open_memory)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=PRECISION)
