"""Exclusive reads on TPU: Infini-attention's memory, additive or with the segment-wise delta rule: the calls.

What the kernels compute is told in pallas_segments_kernels.py. The grid is (batch, blocks of memories, chunks of time),
the last one in order. A chunk is no longer than a segment, so that in it at most one segment of the document that it
goes on with becomes complete, and none of a document that starts inside it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx_kernels.backends import is_interpreted
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.pallas_segments_kernels import Inputs, Plan, backward_kernel, forward_kernel
from lcx_kernels.chunked_memory.pallas_tiles import (
    LANES,
    SUBLANES,
    Lanes,
    call,
    flat,
    flat_state,
    heads_of_state,
    itemsize,
    narrowed,
    round_up,
    share,
    widened,
)
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.residuals import named

_LONGEST = {2: 512, 4: 256}  # by bytes of an element: tokens of a chunk at most
_SHORTEST = 64  # where blocks are large
_BLOCK = 256 * 2**10  # bytes of a block of queries at most, if chunks are not as short as they may be
_STATES = ("memory", "normalizer", "open_memory", "open_normalizer")


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why this file cannot do a call in which segments matter, or None."""
    if static.read != "exclusive":
        return "segment_delta with exclusive reads only"
    if arguments.log_decay is not None:
        return "exclusive reads without decay only"
    k_heads, v_heads = arguments.k.shape[2], arguments.v.shape[2]
    if k_heads != v_heads:
        return "exclusive reads with as many key heads as value heads only"
    if arguments.q is not None and arguments.q.shape[2] < k_heads:
        return "exclusive reads with at least as many query heads as memories only"
    if arguments.state.memory is None:
        return "no normaliser without its memory"
    if arguments.k.shape[3] > 2 * LANES or arguments.v.shape[3] > 4 * LANES:
        return f"keys of at most {2 * LANES} and values of at most {4 * LANES}"
    if static.chunk_size < SUBLANES and not is_interpreted():
        return f"segments of at least {SUBLANES} tokens"
    return None


def _plan(arguments: Arguments, static: Static) -> Plan:
    batch, time, heads, width = arguments.k.shape
    depth = arguments.v.shape[3]
    queries = 1 if arguments.q is None else arguments.q.shape[2] // heads
    paired = heads if queries == 1 or queries % 2 == 0 else 1  # two heads share a register if their states go along
    key, value = widened(width, paired), widened(depth, paired)
    count = 2 if min(key, value) < LANES else 1
    tiles = share(batch, heads // count, 2 if queries == 1 else 1)
    size = itemsize(arguments.q, arguments.k, arguments.v)
    fitting = _BLOCK // (max(key, value) * count * queries * size) // SUBLANES * SUBLANES
    longest = max(_SHORTEST, min(_LONGEST[size], fitting))
    chunk = min(static.chunk_size, longest, round_up(time, SUBLANES))
    if chunk >= SUBLANES:  # shorter ones are for tests
        chunk = chunk // SUBLANES * SUBLANES
    return Plan(
        batch=batch,
        time=time,
        heads=heads,
        width=width,
        depth=depth,
        keys=Lanes(key, count),
        values=Lanes(value, count),
        queries=queries,
        tiles=tiles,
        chunk=chunk,
        delta=static.update == "segment_delta",
        normalize=static.normalize,
        reads=arguments.q is not None,
        dtype=np.dtype(arguments.dtype),
        interpret=is_interpreted(),
    )


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """The backend for calls without `refusal`."""
    plan = _plan(arguments, static)
    out, *states = _scan(plan, _inputs(plan, arguments))
    if out is not None:
        out = narrowed(out.reshape(plan.batch, plan.time, plan.heads * plan.queries, -1), plan.depth)

    matrix = functools.partial(heads_of_state, heads=plan.heads, width=plan.width, depth=plan.depth)

    def vector(normalizer):
        if normalizer is None:
            return None
        return normalizer.reshape(plan.batch, plan.heads, -1)[..., : plan.width]

    return out, SegmentState(matrix(states[0]), vector(states[1]), matrix(states[2]), vector(states[3]))


def _inputs(plan: Plan, arguments: Arguments) -> Inputs:
    keys, values, state = plan.keys, plan.values, arguments.state

    matrix = functools.partial(flat_state, keys=keys, values=values, dtype=plan.dtype)

    def vector(normalizer):
        if normalizer is None:
            return None
        missing = (0, 0), (0, 0), (0, keys.width - plan.width)
        normalizer = jnp.tile(jnp.pad(normalizer.astype(plan.dtype), missing), (1, 1, keys.count))
        return normalizer.reshape(plan.batch, plan.blocks, plan.program_heads, keys.size)

    kinds, flags = _kinds(plan, arguments)
    return Inputs(
        q=flat(arguments.q, keys.width),
        k=flat(arguments.k, keys.width),
        v=flat(arguments.v, values.width),
        kinds=kinds,
        flags=flags,
        memory=matrix(state.memory),
        normalizer=vector(state.normalizer),
        open_memory=matrix(state.open_memory),
        open_normalizer=vector(state.open_normalizer),
    )


def _kinds(plan: Plan, arguments: Arguments) -> tuple[jax.Array, jax.Array]:
    """`Inputs.kinds` and `Inputs.flags`."""
    shape = plan.batch, plan.chunks, plan.chunk

    def chunks(array):
        return jnp.pad(array, ((0, 0), (0, plan.chunks * plan.chunk - plan.time))).reshape(shape)

    reset = arguments.reset
    if reset is None:
        reset = jnp.zeros_like(arguments.closes)
    is_token, reset, closes = chunks(jnp.ones_like(reset)), chunks(reset), chunks(arguments.closes)
    document = jnp.cumsum(reset.at[:, :, 0].set(False), axis=2, dtype=jnp.int32)
    closes = closes & (document == 0) & is_token
    count = jnp.cumsum(closes, axis=2, dtype=jnp.int32)
    after = (document == 0) & (count - closes > 0)
    last = document == document[:, :, -1:]  # what fills up the row goes on with its last document
    kinds = jnp.where(document > 0, 3, jnp.where(after, 1, 0)) + jnp.where(last | (document + after == 0), 0, 1)
    kinds = jnp.where(is_token, kinds, -1).astype(jnp.int32)
    closing, renewed = closes.any(axis=2), document[:, :, -1] > 0
    flags = jnp.stack([reset[:, :, 0], closing, renewed, (kinds > 0).any(axis=2)], axis=2).astype(jnp.int32)
    return kinds[:, :, None], flags[:, :, None]


# The calls.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, inputs: Inputs):
    found = _forward_call(plan, inputs, keep=False)
    return found.get("out"), *(found.get(name) for name in _STATES)


def _forward(plan, inputs):
    found = _forward_call(plan, inputs, keep=True)
    borders = [found.get(name + "_borders") for name in _STATES]
    return (found.get("out"), *(found.get(name) for name in _STATES)), (inputs, borders)


def _backward(plan, residuals, cotangents):
    found = _backward_call(plan, *residuals, *cotangents)
    names = ("q", "k", "v", *_STATES)
    return (Inputs(kinds=None, flags=None, **{name: found.get("d" + name) for name in names}),)


_scan.defvjp(named(_forward), _backward)


class _Blocks:
    """Specs of blocks by kind of array; ``reverse`` goes through the chunks from the last to the first."""

    def __init__(self, plan: Plan, reverse: bool):
        last, rows, heads = plan.chunks - 1, plan.chunk, plan.program_heads
        keys, values = plan.tiles * plan.keys.size, plan.tiles * plan.values.size

        def at(t):
            return last - t if reverse else t

        def tokens(lanes):
            return pl.BlockSpec((None, rows, lanes), lambda b, c, t: (b, at(t), c))

        self.queries, self.keys = tokens(plan.queries * keys), tokens(keys)
        self.values, self.out = tokens(values), tokens(plan.queries * values)
        self.kinds = pl.BlockSpec((None, None, 1, rows), lambda b, c, t: (b, at(t), 0, 0))
        self.flags = pl.BlockSpec((None, None, 1, 4), lambda b, c, t: (b, at(t), 0, 0), memory_space=pltpu.SMEM)
        memory = pl.BlockSpec((None, plan.keys.width, values), lambda b, c, t: (b, 0, c))
        normalizer = pl.BlockSpec((None, None, heads, plan.keys.size), lambda b, c, t: (b, c, 0, 0))
        self.states = dict(zip(_STATES, (memory, normalizer) * 2, strict=True))
        memory = pl.BlockSpec((None, None, plan.keys.width, values), lambda b, c, t: (b, at(t), 0, c))
        normalizer = pl.BlockSpec((None, None, None, heads, plan.keys.size), lambda b, c, t: (b, c, at(t), 0, 0))
        self.borders = dict(zip(_STATES, (memory, normalizer) * 2, strict=True))


def _tokens(inputs: Inputs, blocks: _Blocks) -> dict:
    """What both kernels read, by name: (array or None, spec)."""
    return {
        "q": (inputs.q, blocks.queries),
        "k": (inputs.k, blocks.keys),
        "v": (inputs.v, blocks.values),
        "kinds": (inputs.kinds, blocks.kinds),
        "flags": (inputs.flags, blocks.flags),
    }


def _of_states(plan: Plan, inputs: Inputs, blocks: _Blocks, prefix: str = "") -> dict:
    """Outputs as large as the states, by name."""
    states = {name: getattr(inputs, name) for name in _STATES if getattr(inputs, name) is not None}
    return {prefix + name: (state.shape, plan.dtype, blocks.states[name]) for name, state in states.items()}


def _forward_call(plan: Plan, inputs: Inputs, keep: bool) -> dict:
    """Returns out and the final states; to ``keep``, also the states that chunks start from."""
    blocks = _Blocks(plan, reverse=False)
    given = _tokens(inputs, blocks)
    given |= {"initial_" + name: (getattr(inputs, name), blocks.states[name]) for name in _STATES}
    outputs = _of_states(plan, inputs, blocks)
    if plan.reads:
        shape = plan.batch, plan.time, plan.heads * plan.queries * plan.values.width
        outputs["out"] = (shape, inputs.v.dtype, blocks.out)
    for name in _STATES if keep else ():
        state = getattr(inputs, name)
        if state is not None:
            axis = 1 if state.ndim == 3 else 2
            shape = (*state.shape[:axis], plan.chunks, *state.shape[axis:])
            outputs[name + "_borders"] = (shape, plan.dtype, blocks.borders[name])
    return call(forward_kernel, "segment_memory_forward", plan, given, outputs, {})


def _backward_call(plan: Plan, inputs: Inputs, borders, dout, *dstates) -> dict:
    """Returns gradients by name."""
    blocks = _Blocks(plan, reverse=True)
    given = _tokens(inputs, blocks) | {"dout": (dout, blocks.out)}
    for name, border, dstate in zip(_STATES, borders, dstates, strict=True):
        given[name + "_borders"] = (border, blocks.borders[name])
        given["final_d" + name] = (dstate, blocks.states[name])
    specs = {"q": blocks.queries, "k": blocks.keys, "v": blocks.values}
    arrays = {name: getattr(inputs, name) for name in specs if getattr(inputs, name) is not None}
    outputs = {"d" + name: (array.shape, array.dtype, specs[name]) for name, array in arrays.items()}
    outputs |= _of_states(plan, inputs, blocks, prefix="d")
    state = plan.keys.width, plan.values.size
    scratch = {"dk": (plan.chunk, plan.keys.size), "dv": (plan.chunk, plan.values.size)}
    scratch |= {"dmemory": state, "dopen_memory": state}
    if plan.normalize:
        rows = plan.keys.count, plan.keys.size
        scratch |= {"dnormalizer": rows, "dopen_normalizer": rows}
    return call(backward_kernel, "segment_memory_backward", plan, given, outputs, scratch)
