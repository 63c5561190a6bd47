"""Infini-attention's memory on NVIDIA GPUs: sums over segments and reads in Triton, what is between in XLA.

Time is cut into tiles of a segment's length. Of the document that a tile goes on with at most one segment ends inside
it, and documents that start inside it have nothing to read yet. So a token reads one of two memories, or nothing: that
at the tile's start, or the one with the segment that has ended since (kinds 0, 1 and 2); and what it writes goes into
the segment that was open at the start, or into the one that is open at the end, or is lost (likewise). All tiles are
summed up at once, a scan over tiles gives the memories, and all tokens read at once.

With the delta rule of segments a tile's writes are A - B M, A the sum of k v^T, B that of k k^T / (k . z + epsilon), M
and z what its tokens read: z, which is a sum of keys, comes first, then B of all tiles at once, then the scan.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory import triton_plan
from lcx_kernels.chunked_memory.arguments import Arguments
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.chunked_memory.triton_plan import Segments
from lcx_kernels.residuals import named

F32 = jnp.float32


class Tiles(NamedTuple):
    """Where documents and segments begin and end, as tiles see it.

    Attributes:
      reads, writes: the kinds of all tokens, int8 [batch, time].
      fresh: the tile's first token starts a document; new: a later one does; closed: the segment that was open at the
        start ends; bool [tiles, batch].
    """

    reads: jax.Array
    writes: jax.Array
    fresh: jax.Array
    new: jax.Array
    closed: jax.Array


def mark_tiles(reset: jax.Array | None, closes: jax.Array, tile: int) -> Tiles:
    batch, time = closes.shape
    reset = jnp.zeros_like(closes) if reset is None else reset

    def tiles(array):
        return jnp.pad(array, [(0, 0), (0, -time % tile)]).reshape(batch, -1, tile)

    def tokens(array):
        return array.astype(jnp.int8).reshape(batch, -1)[:, :time]

    reset, closes = tiles(reset), tiles(closes)
    document = jnp.cumsum(reset.at[:, :, 0].set(False), axis=2, dtype=jnp.int32)
    ends = closes & (document == 0)
    after = jnp.cumsum(ends, axis=2, dtype=jnp.int32) - ends > 0
    last = document == document[:, :, -1:]
    reads = jnp.where(document > 0, 2, after)
    writes = jnp.where((document == 0) & ~after, 0, jnp.where(last, 1, 2))
    flags = reset[:, :, 0], document[:, :, -1] > 0, ends.any(axis=2)
    return Tiles(tokens(reads), tokens(writes), *(flag.T for flag in flags))


def scan(run, plan: Segments, arguments: Arguments, delta: bool) -> tuple[jax.Array | None, SegmentState]:
    """The backend for segments; ``run`` runs a launch. Differentiated by JAX but for sums and reads."""
    q, k, v, state = arguments.q, arguments.k, arguments.v, arguments.state
    marks = mark_tiles(arguments.reset, arguments.closes, plan.tile)
    heads, normalize = plan.shape.heads, state.normalizer is not None
    sums = functools.partial(_sums, run, plan, heads)
    matrices, vectors = sums(normalize, k, v, None, marks.writes)
    keys = None
    normalizers, last, last_open = None, None, None
    if normalize:
        normalizers, last, last_open = _through_tiles(marks, vectors, None, state.normalizer, state.open_normalizer)
    if delta:
        found = _denominators(run, plan, heads, k, normalizers, marks.reads)
        keys, _ = sums(False, k, k, jnp.where(marks.reads[..., None] < 2, 1 / found, 0), marks.writes)
    memories, memory, opened = _through_tiles(marks, matrices, keys, state.memory, state.open_memory)
    out = None
    if q is not None:
        lanes = max(heads, q.shape[2])
        out = _reads(run, plan, lanes, v.dtype, q, memories, normalizers, marks.reads)
    return out, SegmentState(memory, last, opened, last_open)


def _through_tiles(marks: Tiles, written, keys, state, opened):
    """(what tokens of kinds 0 and 1 read, [batch, tiles, 2, ..], what is complete at the end, what is open then).

    written [batch, tiles, 2, heads, ..], what each kind of tokens writes; keys likewise [.., K, K], B, or None.
    """

    def step(carried, tile):
        written, keys, fresh, new, closed = tile

        def pick(mask, one, other):
            return jnp.where(mask.reshape(-1, *[1] * (other.ndim - 1)), one, other)

        def writes(kind, memory):
            if keys is None:
                return written[:, kind]
            return written[:, kind] - jnp.matmul(keys[:, kind], memory, precision="highest")

        early, opened = (pick(fresh, jnp.zeros_like(part), part) for part in carried)
        opened = opened + writes(0, early)
        late = early + opened
        after = writes(1, pick(new, jnp.zeros_like(late), late))
        state = pick(new, jnp.zeros_like(late), pick(closed, late, early))
        return (state, pick(new | closed, after, opened)), jnp.stack([early, late], axis=1)

    tiles = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (written, keys))
    (state, opened), read = jax.lax.scan(step, (state, opened), (*tiles, marks.fresh, marks.new, marks.closed))
    return jnp.moveaxis(read, 0, 1), state, opened


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sums(run, plan, heads, vectors, x, y, weight, kind):
    """Sums of weight x y^T, and of x, [batch, tiles, 2, heads, ..]."""
    launch = triton_plan.segment_sums(plan, x, y, weight, None, kind, heads, F32, vectors=vectors)
    matrices, keys = run(launch)
    return matrices.sum(axis=3), keys.sum(axis=3) if vectors else None


def _sums_forward(run, plan, heads, vectors, x, y, weight, kind):
    return _sums(run, plan, heads, vectors, x, y, weight, kind), (x, y, weight, kind)


def _sums_backward(run, plan, heads, vectors, residuals, cotangents):
    x, y, weight, kind = residuals
    d_matrices, d_vectors = cotangents
    reads = functools.partial(triton_plan.segment_reads, plan, kind=kind, lanes=heads, dtypes=(F32, F32))
    ones = jnp.ones_like(x, F32, shape=(*x.shape[:2], heads)) if vectors else None
    dx, _ = run(reads(y, d_matrices, d_vectors, weight, ones, transposed=True))
    dy, _ = run(reads(x, d_matrices, None, None, None))
    d_weight = None
    if weight is not None:
        spread = jnp.repeat(y, heads // y.shape[2], axis=2)
        d_weight = jnp.sum(spread.astype(F32) * dy, axis=-1)
        dy = weight[..., None] * dy
    return _added_up(x, dx), _added_up(y, dy), d_weight, None


_sums.defvjp(named(_sums_forward), _sums_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _denominators(run, plan, heads, k, normalizers, kind):
    """k . z + epsilon, [batch, time, heads]; 1 where a token reads nothing."""
    return run(triton_plan.segment_reads(plan, k, None, normalizers, None, None, kind, heads, (F32, F32), divide=True))[
        1
    ]


def _denominators_forward(run, plan, heads, k, normalizers, kind):
    return _denominators(run, plan, heads, k, normalizers, kind), (k, normalizers, kind)


def _denominators_backward(run, plan, heads, residuals, slope):
    k, normalizers, kind = residuals
    dk, _ = run(triton_plan.segment_reads(plan, k, None, normalizers, None, slope, kind, heads, (F32, F32)))
    launch = triton_plan.segment_sums(plan, k, None, None, slope, kind, heads, F32, vectors=True)
    return _added_up(k, dk), run(launch)[1].sum(axis=3), None


_denominators.defvjp(named(_denominators_forward), _denominators_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _reads(run, plan, lanes, dtype, q, memories, normalizers, kind):
    """q M, divided by q . z + epsilon if there are normalisers, [batch, time, lanes, V]."""
    return _reads_forward(run, plan, lanes, dtype, q, memories, normalizers, kind)[0]


def _reads_forward(run, plan, lanes, dtype, q, memories, normalizers, kind):
    divide = normalizers is not None
    launch = triton_plan.segment_reads(
        plan, q, memories, normalizers, None, None, kind, lanes, (dtype, F32), divide=divide
    )
    out, denominator = run(launch)
    return out, (q, memories, normalizers, kind, *((out, denominator) if divide else (None, None)))


def _reads_backward(run, plan, lanes, dtype, residuals, dy):
    q, memories, normalizers, kind, out, denominator = residuals
    weight, slope, heads = None, None, memories.shape[3]
    if normalizers is not None:
        weight = 1 / denominator
        slope = -jnp.sum(dy.astype(F32) * out.astype(F32), axis=-1) * weight
    partial = q.dtype if q.shape[2] == lanes else F32
    launch = functools.partial(triton_plan.segment_reads, plan, kind=kind, lanes=lanes, dtypes=(partial, F32))
    dq, _ = run(launch(dy, memories, normalizers, weight, slope, transposed=True))
    launch = triton_plan.segment_sums(plan, q, dy, weight, slope, kind, heads, F32, vectors=normalizers is not None)
    matrices, vectors = run(launch)
    d_normalizers = None if normalizers is None else vectors.sum(axis=3)
    return _added_up(q, dq), matrices.sum(axis=3), d_normalizers, None


_reads.defvjp(named(_reads_forward), _reads_backward)


def _added_up(array: jax.Array, parts: jax.Array) -> jax.Array:
    """The gradient of an array [batch, time, heads, ..] from those of a multiple of its heads."""
    heads = array.shape[2]
    if parts.shape[2] != heads:
        parts = parts.reshape(*parts.shape[:2], heads, -1, *parts.shape[3:]).sum(axis=3)
    return parts.astype(array.dtype)
