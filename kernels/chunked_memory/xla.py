"""The chunked memory in plain XLA operations: the default on CPU, and on any platform what can do everything.

A row goes by blocks of tokens. Inside a block its chunks (`xla_chunks`), or its segments where only these matter
(`xla_segments`), are computed at once but for the small state that goes from one to the next: on accelerators a block
is long, so that a single row fills them, on CPUs it is as long as its temporaries stay in the caches. The forward pass
keeps the states between blocks, and the backward pass computes each block again and differentiates it (Chen et al.
2016, arXiv 1604.06174). Blocks are read and written in place: there is no other copy of a whole sequence.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.backends import target_platform
from lcx_kernels.chunked_memory import isolation, xla_chunks, xla_segments
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.isolation import Marks, Tokens
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.residuals import named
from lcx_kernels.varying import vary_alike

# Tokens of a chunk at most, a power of two: pairs cost a token chunk * (K + V), states between chunks K * V / chunk.
LONGEST_CHUNK = {"cpu": 64, "gpu": 128, "tpu": 128}
LONGEST_CHUNK_OF_CHANNELS = 64  # with a decay a channel, and for the triangular systems of the delta rule
# Tokens of a tile of segments, which may be shorter than a segment: on CPUs what fits the caches, else whole segments.
LONGEST_TILE = {"cpu": 256}
# Numbers of a block, counting pairs of tokens, or segments' values, if that is a chunk or more. On CPUs, more than the
# caches hold cost several times the time.
NUMBERS_AT_ONCE = {"cpu": 2**16, "gpu": 2**22, "tpu": 2**22}


class Plan(NamedTuple):
    """What is known while tracing."""

    static: Static
    segments: bool  # whether chunks are segments' tiles
    size: int  # tokens of a chunk
    block: int  # tokens of a block, whole chunks
    heads: int  # of out
    out_dtype: Any


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """Return out [batch, time, heads, V] in v's dtype, None without q, and the final state."""
    q, v, heads = arguments.q, arguments.v, arguments.heads
    if q is None and static.update == "segment_delta":
        static = static._replace(read="exclusive")  # nothing is read; inclusive would mean the values, as below
    if static.update == "segment_delta" and static.read == "inclusive":
        # Linear, once it is known what is written.
        values, state = _run(arguments._replace(q=None), static, heads, arguments.dtype)
        plain = arguments._replace(v=values, closes=None, state=arguments.state.total())
        out, _ = scan(plain, static._replace(update="linear"))
        return out.astype(v.dtype), state
    return _run(arguments, static, max(heads, 0 if q is None else q.shape[2]), v.dtype)


def _run(arguments: Arguments, static: Static, heads: int, out_dtype: Any):
    tokens, marks = Tokens(*arguments[:5]), Marks(arguments.closes, arguments.reset)
    return _padded(_plan(arguments, static, heads, out_dtype), tokens, marks, arguments.state)


@functools.partial(jax.jit, static_argnums=(0,))  # some hundred operations, where the caller has not compiled them
def _padded(plan: Plan, tokens: Tokens, marks: Marks, state: SegmentState):
    time = tokens.k.shape[1]

    def pad(array: jax.Array) -> jax.Array:  # with tokens that neither decay nor write
        return jnp.pad(array, [(0, 0), (0, -time % plan.block)] + [(0, 0)] * (array.ndim - 2))

    tokens, marks = jax.tree.map(pad, (tokens, marks))
    out, state = _scan(plan, *vary_alike((tokens, marks, state)))
    return None if out is None else out[:, :time], state


def _plan(arguments: Arguments, static: Static, heads: int, out_dtype: Any) -> Plan:
    batch, time, _, width = arguments.k.shape
    segments = static.segmented and arguments.log_decay is None
    if segments:
        size = min(static.chunk_size, time, LONGEST_TILE.get(target_platform(), time))
        numbers = max(width, arguments.v.shape[3])
    else:
        longest = LONGEST_CHUNK[target_platform()]
        if static.update == "delta_rule" or (arguments.log_decay is not None and arguments.log_decay.ndim == 4):
            longest = min(longest, LONGEST_CHUNK_OF_CHANNELS)
        if not static.segmented:
            longest = min(longest, static.chunk_size)
        size = numbers = _power_of_two(min(longest, 2 * time - 1))
    at_once = NUMBERS_AT_ONCE[target_platform()] // (batch * heads * numbers)
    blocks = -(-time // max(size, at_once))  # as many as needed, and as even as can be
    return Plan(static, segments, size, -(-time // (blocks * size)) * size, heads, jnp.dtype(out_dtype))


def _power_of_two(limit: int) -> int:
    """The largest that is not above the limit."""
    return 1 << limit.bit_length() - 1


def _block(plan: Plan, tokens: Tokens, marks: Marks, state: SegmentState):
    return (xla_segments if plan.segments else xla_chunks).block(plan.static, plan.size, tokens, marks, state)


def _cleaned(plan: Plan, tokens: Tokens, marks: Marks, state: SegmentState):
    tokens = jax.tree.map(lambda array: array.astype(state.memory.dtype), tokens)
    return isolation.cleaned(tokens, marks, state, plan.static.read == "exclusive")


def _at(arrays: Any, start: jax.Array, plan: Plan) -> Any:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, plan.block, axis=1), arrays)


def _put(arrays: Any, pieces: Any, start: jax.Array) -> Any:
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    return jax.tree.map(lambda array, piece: put(array, piece.astype(array.dtype)), arrays, pieces)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, tokens: Tokens, marks: Marks, state: SegmentState):
    """Whole blocks of tokens to (out, final state)."""
    return _forward(plan, tokens, marks, state)[0]


def _forward(plan: Plan, tokens: Tokens, marks: Marks, state: SegmentState):
    def block(carry, start):
        found, out = carry
        these = _at(marks, start, plan)
        clean, state, spoilt = _cleaned(plan, _at(tokens, start, plan), these, found)
        piece, final = _block(plan, clean, these, state)
        piece, final = isolation.spoil_out(piece, spoilt), isolation.spoil_state(final, spoilt)
        return (final, None if piece is None else _put(out, piece, start)), found

    batch, time = tokens.k.shape[:2]
    out = None
    if tokens.q is not None or (plan.segments and plan.static.read == "inclusive"):
        out = jnp.zeros((batch, time, plan.heads, tokens.v.shape[3]), plan.out_dtype)
        out, _ = vary_alike((out, tokens.v))
    (final, out), borders = _over_blocks(block, (state, out), plan, time)
    return (out, final), (tokens, marks, borders)


def _backward(plan: Plan, residuals, cotangents):
    tokens, marks, borders = residuals
    d_out, d_state = cotangents
    dtype = borders.memory.dtype

    def block(carry, inputs):
        d_state, gradients = carry
        start, found = inputs
        these = _at(marks, start, plan)
        clean, state, spoilt = _cleaned(plan, _at(tokens, start, plan), these, found)
        _, transpose = jax.vjp(lambda tokens, state: _block(plan, tokens, these, state), clean, state)
        d_piece = bad = None
        if d_out is not None:
            d_piece, bad = isolation.clean_gradient(_at(d_out, start, plan).astype(dtype))
        d_state, finally_bad, open_bad = isolation.clean_state(d_state)
        pieces, d_state = transpose((d_piece, d_state))
        pieces, d_state = isolation.spoil_gradients(pieces, d_state, bad, finally_bad | open_bad, spoilt, these)
        return (d_state, _put(gradients, pieces, start)), None

    gradients = jax.tree.map(jnp.zeros_like, tokens)
    carry = d_state, gradients
    (d_state, gradients), _ = _over_blocks(block, carry, plan, tokens.k.shape[1], borders)
    return gradients, jax.tree.map(lambda mark: None, marks), d_state


_scan.defvjp(named(_forward), _backward)


def _over_blocks(block, carry, plan: Plan, time: int, borders: SegmentState | None = None):
    """A scan over the blocks' starts; with ``borders``, the states that blocks find, from the last block on."""
    count = time // plan.block
    backward = borders is not None
    if count == 1:
        start = jnp.zeros((), jnp.int32)
        inputs = (start, jax.tree.map(lambda array: array[0], borders)) if backward else start
        carry, found = block(carry, inputs)
        return carry, jax.tree.map(lambda array: array[None], found)
    starts = jnp.arange(count, dtype=jnp.int32) * plan.block
    return jax.lax.scan(block, carry, (starts, borders) if backward else starts, reverse=backward)
