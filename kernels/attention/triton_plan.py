"""How attention's Triton kernels are launched: block sizes by shape, which blocks see each other, arguments in order.

Nothing here needs Triton or a GPU. `forward` and `backward` hand each launch to a function that runs it, so that the
tests run exactly these launches in Triton's interpreter.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.attention.arguments import Arguments, Static

LARGEST_WIDTH = 256


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, and loads that run ahead of a loop."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    backward_queries: Tile
    backward_keys: Tile


# By the size of a number in bytes and the larger of the two widths, at most. For bfloat16 up to 128 the fastest of some
# ten measured on an H100 (8,192 tokens, 16 query heads of 4 key heads) that spill no registers. Heads above 128 spill.
PLANS = {
    (2, 64): Plan(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    (2, 128): Plan(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(32, 128, 8, 2)),
    (2, 256): Plan(Tile(64, 32, 4, 2), Tile(32, 32, 8, 1), Tile(16, 64, 8, 1)),
    (4, 64): Plan(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 128): Plan(Tile(16, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
    (4, 256): Plan(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# Where windows or documents hide much of what is before a query, smaller blocks meet less of it.
PLANS_OF_PARTS = PLANS | {(2, 128): Plan(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 128, 8, 2))}
# The derivative of a softcap takes registers.
CAPPED_BACKWARD_KEYS = {(2, 64): Tile(32, 64, 4, 3), (2, 128): Tile(32, 64, 8, 2), (4, 128): Tile(16, 32, 8, 1)}
SMALLEST_BLOCK = 16


class Launch(NamedTuple):
    """One kernel launch. The kernel's parameters are inputs, scalars and outputs, in this order, then the constants."""

    kernel: str
    programs: int
    warps: int
    stages: int
    inputs: tuple[Any, ...]
    scalars: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], Any], ...]  # shape and dtype of each
    constants: dict[str, Any]


def make_plan(arguments: Arguments, static: Static) -> Plan:
    """The tiles for a call. ``chunk_size`` is an upper limit, from 16 on."""
    plans = PLANS if static.window is None and arguments.query_segment is None else PLANS_OF_PARTS
    itemsize, width = arguments.q.dtype.itemsize, max(arguments.q.shape[3], arguments.v.shape[3])
    key = next((size, limit) for size, limit in plans if size == itemsize and width <= limit)
    plan = plans[key]
    if static.softcap is not None:
        plan = plan._replace(backward_keys=CAPPED_BACKWARD_KEYS.get(key, plan.backward_keys))
    if static.chunk_size is None:
        return plan
    largest = max(SMALLEST_BLOCK, 1 << (static.chunk_size.bit_length() - 1))
    return Plan(*(t._replace(queries=min(t.queries, largest), keys=min(t.keys, largest)) for t in plan))


def _power_of_two(number: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (number - 1).bit_length())


class _Blocks(NamedTuple):
    """The smallest and largest index and segment in each block, int32 [batch or 1, blocks]; which are full."""

    first: jax.Array
    last: jax.Array
    segments: tuple[jax.Array, jax.Array] | None
    whole: jax.Array


def _extremes(array: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest number of each block of ``size``, of [batch, length]."""
    missing = -array.shape[1] % size
    blocks = jnp.pad(array, ((0, 0), (0, missing)), mode="edge").reshape(array.shape[0], -1, size)
    return blocks.min(-1), blocks.max(-1)


def _blocks(index: jax.Array | None, segment: jax.Array | None, length: int, offset: int, size: int) -> _Blocks:
    starts = jnp.arange(0, length, size, dtype=jnp.int32)[None]
    ends = jnp.minimum(starts + size, length)
    extremes = (starts + offset, ends - 1 + offset) if index is None else _extremes(index, size)
    return _Blocks(*extremes, None if segment is None else _extremes(segment, size), ends - starts == size)


def _meetings(arguments: Arguments, static: Static, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Whether any pair, and whether every pair, of each two blocks sees each other: [batch or 1, queries, keys].

    The first errs on the side of yes, the second on that of no.
    """
    time, keys = arguments.q.shape[1], arguments.k.shape[1]
    q = _blocks(arguments.query_index, arguments.query_segment, time, static.offset or 0, tile.queries)
    k = _blocks(arguments.key_index, arguments.key_segment, keys, 0, tile.keys)
    q, k = jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None, :], k)
    every = q.whole & k.whole
    some = jnp.ones_like(every)
    if static.causal:
        some, every = some & (k.first <= q.last), every & (k.last <= q.first)
    if static.window is not None:
        some, every = some & (k.last > q.first - static.window), every & (k.first > q.last - static.window)
    if q.segments is not None:
        (q_low, q_high), (k_low, k_high) = q.segments, k.segments
        some, every = some & (k_low <= q_high) & (q_low <= k_high), every & (k_low == q_high) & (q_low == k_high)
    return some, every


def _ranges(some: jax.Array, every: jax.Array) -> jax.Array:
    """(low, low_full, high_full, high) along the last axis, int32 [..., 4]: see `triton_kernels`."""
    count = some.shape[-1]
    number = jnp.arange(count, dtype=jnp.int32)
    low = jnp.min(jnp.where(some, number, count), -1)
    high = jnp.max(jnp.where(some, number + 1, 0), -1)
    low = jnp.minimum(low, high)
    low_full = jnp.minimum(jnp.min(jnp.where(every, number, count), -1), high)
    gap = (number >= low_full[..., None]) & ~every
    high_full = jnp.minimum(jnp.min(jnp.where(gap, number, count), -1), high)
    return jnp.stack([low, low_full, high_full, high], axis=-1)


def _launch(
    kernel: str, arguments: Arguments, static: Static, tile: Tile, extra: tuple, outputs: tuple, by_keys: bool
) -> Launch:
    batch, time, heads, width = arguments.q.shape
    _, keys, kv_heads, value_width = arguments.v.shape
    some, every = _meetings(arguments, static, tile)
    ranges = _ranges(some.swapaxes(1, 2), every.swapaxes(1, 2)) if by_keys else _ranges(some, every)
    programs = batch * (kv_heads * math.ceil(keys / tile.keys) if by_keys else heads * math.ceil(time / tile.queries))
    if programs >= 2**31:
        raise ValueError(f"q: {batch} rows of {time} tokens and {heads} heads need {programs} programs, too many")
    inputs = tuple(ranges if array is None else array for array in (*arguments, ranges, *extra))
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "PADDED": _power_of_two(width),
        "PADDED_VALUE": _power_of_two(value_width),
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "CAUSAL": static.causal,
        "WINDOW": static.window,
        "HAS_INDEX": arguments.query_index is not None,
        "HAS_SEGMENT": arguments.query_segment is not None,
        "SCALE": static.scale,
        "SOFTCAP": static.softcap,
        "PER_ROW": ranges.shape[0] > 1,
        "PRECISION": "ieee",
    }
    scalars = (time, keys, static.offset or 0)
    return Launch(kernel, programs, tile.warps, tile.stages, inputs, scalars, outputs, constants)


def forward(run: Callable[[Launch], tuple], arguments: Arguments, static: Static) -> tuple:
    """(out in q's dtype, log_sum_exp in float32). Args: run, from a launch to its output arrays."""
    plan = make_plan(arguments, static)
    q, v = arguments.q, arguments.v
    outputs = ((*q.shape[:3], v.shape[3]), q.dtype), (q.shape[:3], jnp.float32)
    return run(_launch("forward", arguments, static, plan.forward, (), outputs, by_keys=False))


def backward(
    run: Callable[[Launch], tuple],
    arguments: Arguments,
    static: Static,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    delta: jax.Array,
) -> tuple:
    """(dq, dk, dv) in the dtypes of q, k and v; log_sum_exp and delta, float32, as of `api.attention_gradients`."""
    plan = make_plan(arguments, static)
    extra = d_out.astype(arguments.q.dtype), log_sum_exp, delta
    outputs = tuple((array.shape, array.dtype) for array in arguments[:3])
    (dq,) = run(
        _launch("backward_queries", arguments, static, plan.backward_queries, extra, outputs[:1], by_keys=False)
    )
    dk, dv = run(_launch("backward_keys", arguments, static, plan.backward_keys, extra, outputs[1:], by_keys=True))
    return dq, dk, dv
