"""Inclusive reads on TPU: linear attention, SSD and the delta rule, with no decay or one a head: the calls.

What the kernels compute is told in pallas_inclusive_kernels.py. The grid is (batch, blocks of heads, chunks of time),
the last one in order. Arrays by token are read in the caller's dtype and layout, [batch, time, heads * width], where
heads are 64 or a multiple of 128 wide; others are padded with zeros, which change nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lcx_kernels.backends import is_interpreted
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.pallas_inclusive_kernels import Plan, backward_kernel, forward_kernel
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

_LONGEST = {"linear": 256, "delta_rule": 128}  # tokens of a chunk at most
_BLOCK = 768 * 2**10  # bytes of a block of values, and of a program's states, at most
_TILES = 4  # of a program whose heads do not share keys


class _Inputs(NamedTuple):
    """What the kernels read; absent where the call has none."""

    q: jax.Array | None  # [batch, time, k heads * K]
    k: jax.Array
    v: jax.Array  # [batch, time, heads * V]
    decay: jax.Array | None  # [batch, blocks, chunks, program heads, chunk]
    beta: jax.Array | None
    document: jax.Array | None  # int32 [batch, chunks, 1, chunk]: resets in the chunk up to a token; -1 is no token
    memory: jax.Array  # [batch, K, heads * V]
    normalizer: jax.Array | None  # [batch, blocks, program heads, lanes of a tile's keys]: 0 outside of a head's


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why this file cannot do a call with inclusive reads, or None."""
    k_heads, v_heads = arguments.k.shape[2], arguments.v.shape[2]
    if v_heads < k_heads:
        return "no value head with several key heads"
    if arguments.q is not None and arguments.q.shape[2] != k_heads:
        return "inclusive reads with as many query heads as key heads only"
    if arguments.state.memory is None:
        return "no normaliser without its memory"
    if arguments.k.shape[3] > 2 * LANES or arguments.v.shape[3] > 4 * LANES:
        return f"keys of at most {2 * LANES} and values of at most {4 * LANES}"
    return None


def _plan(arguments: Arguments, static: Static) -> Plan:
    batch, time, k_heads, width = arguments.k.shape
    heads, depth = arguments.v.shape[2:]
    ratio = heads // k_heads
    shared = ratio > 1
    if shared:
        key, value = widened(width, 2 if k_heads == 1 else 1), widened(depth, ratio)
        count = 2 if value < LANES else 1
        keys = Lanes(key, 1)
    else:
        key, value = widened(width, heads), widened(depth, heads)
        count = 2 if min(key, value) < LANES else 1
        keys = Lanes(key, count)
    dtype = np.dtype(arguments.dtype)
    chunk = min(round_up(static.chunk_size, SUBLANES), _LONGEST[static.update], round_up(time, SUBLANES))
    bytes_of_tile = value * count * max(chunk * itemsize(arguments.k, arguments.v), key * 4)
    most = min(_BLOCK // bytes_of_tile, *([] if shared else [_TILES]), ratio if shared else heads)
    tiles = share(batch, (ratio if shared else heads) // count, most, k_heads if shared else 1)
    return Plan(
        batch=batch,
        time=time,
        heads=heads,
        width=width,
        depth=depth,
        keys=keys,
        values=Lanes(value, count),
        shared=shared,
        tiles=tiles,
        key_programs=ratio // (tiles * count) if shared else 1,
        chunk=chunk,
        delta=static.update == "delta_rule",
        normalize=static.normalize,
        decays=arguments.log_decay is not None,
        documents=arguments.reset is not None or time % chunk != 0,
        reads=arguments.q is not None,
        dtype=dtype,
        interpret=is_interpreted(),
    )


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """The backend for calls without `refusal`."""
    plan = _plan(arguments, static)
    out, memory, normalizer = _scan(plan, _inputs(plan, arguments))
    if out is not None:
        out = narrowed(out.reshape(plan.batch, plan.time, plan.heads, -1), plan.depth)
    if plan.normalize:
        normalizer = _from_lanes(plan, normalizer)
    memory = heads_of_state(memory, plan.heads, plan.width, plan.depth)
    return out, SegmentState(memory, normalizer, None, None)


def _inputs(plan: Plan, arguments: Arguments) -> _Inputs:
    def rows(array):
        if array is None:
            return None
        array = jnp.swapaxes(array.astype(plan.dtype), 1, 2)
        array = jnp.pad(array, ((0, 0), (0, 0), (0, plan.chunks * plan.chunk - plan.time)))
        array = array.reshape(plan.batch, plan.blocks, plan.program_heads, plan.chunks, plan.chunk)
        return jnp.swapaxes(array, 2, 3)

    return _Inputs(
        q=flat(arguments.q, plan.keys.width),
        k=flat(arguments.k, plan.keys.width),
        v=flat(arguments.v, plan.values.width),
        decay=rows(arguments.log_decay),
        beta=rows(arguments.beta),
        document=documents_by_chunk(plan, arguments) if plan.documents else None,
        memory=flat_state(arguments.state.memory, plan.keys, plan.values, plan.dtype),
        normalizer=_to_lanes(plan, arguments.state.normalizer) if plan.normalize else None,
    )


def documents_by_chunk(plan: Any, arguments: Arguments) -> jax.Array:
    """`_Inputs.document`, of a plan with batch, time, chunks and chunk."""
    reset = arguments.reset
    if reset is None:
        reset = jnp.zeros_like(arguments.k[:, :, 0, 0], dtype=bool)
    missing = ((0, 0), (0, plan.chunks * plan.chunk - plan.time))
    shape = plan.batch, plan.chunks, plan.chunk
    count = jnp.cumsum(jnp.pad(reset, missing).reshape(shape), axis=2, dtype=jnp.int32)
    is_token = jnp.pad(jnp.ones_like(reset), missing).reshape(shape)
    return jnp.where(is_token, count, -1)[:, :, None]


def _to_lanes(plan: Plan, normalizer: jax.Array) -> jax.Array:
    """[batch, heads, K] to the form of `_Inputs`."""
    keys = plan.keys
    normalizer = jnp.pad(normalizer.astype(plan.dtype), ((0, 0), (0, 0), (0, keys.width - plan.width)))
    if keys.count > 1:
        own = jnp.eye(keys.count, dtype=plan.dtype)[:, :, None]
        normalizer = normalizer.reshape(plan.batch, -1, keys.count, 1, keys.width)
        normalizer = jnp.where(own == 1, normalizer, jnp.zeros_like(normalizer))
    return normalizer.reshape(plan.batch, plan.blocks, plan.program_heads, keys.size)


def _from_lanes(plan: Plan, normalizer: jax.Array) -> jax.Array:
    keys = plan.keys
    normalizer = normalizer.reshape(plan.batch, -1, keys.count, keys.count, keys.width)
    parts = [normalizer[:, :, head, head] for head in range(keys.count)]
    return jnp.stack(parts, axis=2).reshape(plan.batch, plan.heads, keys.width)[..., : plan.width]


# The calls.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, inputs: _Inputs):
    found = _forward_call(plan, inputs, keep=False)
    return found.get("out"), found["memory"], found.get("normalizer")


def _forward(plan, inputs):
    found = _forward_call(plan, inputs, keep=True)
    outputs = found.get("out"), found["memory"], found.get("normalizer")
    return outputs, (inputs, found["borders"], found.get("normalizer_borders"))


def _backward(plan, residuals, cotangents):
    found = _backward_call(plan, *residuals, *cotangents)
    inputs = residuals[0]

    def of_keys(name):
        partial = found.get("d" + name)
        if partial is None or plan.key_programs == 1:
            return partial
        partial = partial.reshape(plan.batch, -1, plan.key_programs, plan.time, plan.keys.size).sum(axis=2)
        array = getattr(inputs, name)
        partial = partial if partial.shape[1] == 1 else jnp.swapaxes(partial, 1, 2)
        return partial.reshape(array.shape).astype(array.dtype)

    gradients = {name: found.get("d" + name) for name in ("v", "decay", "beta", "memory", "normalizer")}
    return (_Inputs(q=of_keys("q"), k=of_keys("k"), document=None, **gradients),)


_scan.defvjp(named(_forward), _backward)


class _Blocks:
    """Specs of blocks by kind of array; ``reverse`` goes through the chunks from the last to the first."""

    def __init__(self, plan: Plan, reverse: bool):
        last, programs = plan.chunks - 1, plan.key_programs
        lanes = plan.program_heads * plan.values.width
        heads, rows = plan.program_heads, plan.chunk

        def at(t):
            return last - t if reverse else t

        def group(c):
            return jax.lax.div(c, np.int32(programs)) if programs > 1 else c

        self.keys = pl.BlockSpec((None, rows, plan.key_lanes), lambda b, c, t: (b, at(t), group(c)))
        self.partial = pl.BlockSpec((None, None, rows, plan.key_lanes), lambda b, c, t: (b, c, at(t), 0))
        self.values = pl.BlockSpec((None, rows, lanes), lambda b, c, t: (b, at(t), c))
        self.rows = pl.BlockSpec((None, None, None, heads, rows), lambda b, c, t: (b, c, at(t), 0, 0))
        self.document = pl.BlockSpec((None, None, 1, rows), lambda b, c, t: (b, at(t), 0, 0))
        self.memory = pl.BlockSpec((None, plan.state_rows, lanes), lambda b, c, t: (b, 0, c))
        self.border = pl.BlockSpec((None, None, plan.state_rows, lanes), lambda b, c, t: (b, at(t), 0, c))
        self.normalizer = pl.BlockSpec((None, None, heads, plan.keys.size), lambda b, c, t: (b, c, 0, 0))
        self.normalizer_border = pl.BlockSpec(
            (None, None, None, heads, plan.keys.size), lambda b, c, t: (b, c, at(t), 0, 0)
        )


def _tokens(inputs: _Inputs, blocks: _Blocks) -> dict:
    """What both kernels read, by name: (array or None, spec)."""
    return {
        "q": (inputs.q, blocks.keys),
        "k": (inputs.k, blocks.keys),
        "v": (inputs.v, blocks.values),
        "decay": (inputs.decay, blocks.rows),
        "beta": (inputs.beta, blocks.rows),
        "document": (inputs.document, blocks.document),
    }


def _forward_call(plan: Plan, inputs: _Inputs, keep: bool) -> dict:
    """Returns out and the final states; to ``keep``, also the states that chunks start from."""
    blocks = _Blocks(plan, reverse=False)
    given = _tokens(inputs, blocks)
    given |= {"initial": (inputs.memory, blocks.memory), "initial_normalizer": (inputs.normalizer, blocks.normalizer)}
    outputs = {"memory": (inputs.memory.shape, plan.dtype, blocks.memory)}
    if plan.reads:
        outputs["out"] = (inputs.v.shape, inputs.v.dtype, blocks.values)
    if plan.normalize:
        outputs["normalizer"] = (inputs.normalizer.shape, plan.dtype, blocks.normalizer)
    if keep:
        batch, *state = inputs.memory.shape
        outputs["borders"] = ((batch, plan.chunks, *state), plan.dtype, blocks.border)
    if keep and plan.normalize:
        batch, programs, *state = inputs.normalizer.shape
        shape = batch, programs, plan.chunks, *state
        outputs["normalizer_borders"] = (shape, plan.dtype, blocks.normalizer_border)
    name = "delta_rule_forward" if plan.delta else "linear_memory_forward"
    return call(forward_kernel, name, plan, given, outputs, {})


def _backward_call(plan: Plan, inputs: _Inputs, borders, normalizer_borders, dout, dmemory, dnormalizer) -> dict:
    """Returns gradients by name; dq and dk in float32 parts [batch, blocks, time, K] where programs share keys."""
    blocks = _Blocks(plan, reverse=True)
    given = _tokens(inputs, blocks)
    given |= {
        "borders": (borders, blocks.border),
        "normalizer_borders": (normalizer_borders, blocks.normalizer_border),
        "dout": (dout, blocks.values),
        "dfinal": (dmemory, blocks.memory),
        "dfinal_normalizer": (dnormalizer, blocks.normalizer),
    }
    outputs = {}
    for name in ("q", "k"):
        array = getattr(inputs, name)
        if array is None:
            continue
        if plan.key_programs == 1:
            outputs["d" + name] = (array.shape, array.dtype, blocks.keys)
        else:
            shape = plan.batch, plan.blocks, plan.time, plan.key_lanes
            outputs["d" + name] = (shape, plan.dtype, blocks.partial)
    outputs["dv"] = (inputs.v.shape, inputs.v.dtype, blocks.values)
    outputs |= {
        "d" + name: (getattr(inputs, name).shape, plan.dtype, blocks.rows)
        for name in ("decay", "beta")
        if getattr(inputs, name) is not None
    }
    outputs["dmemory"] = (inputs.memory.shape, plan.dtype, blocks.memory)
    if plan.normalize:
        outputs["dnormalizer"] = (inputs.normalizer.shape, plan.dtype, blocks.normalizer)
    scratch = {}
    if plan.shared and plan.reads:
        scratch |= {"scores": (plan.chunk, plan.chunk), "q": (plan.chunk, plan.keys.size)}
    if plan.shared:
        scratch |= {"k": (plan.chunk, plan.keys.size)}
    if plan.shared and plan.delta:
        scratch |= {"overlaps": (plan.chunk, plan.chunk)}
    name = "delta_rule_backward" if plan.delta else "linear_memory_backward"
    return call(backward_kernel, name, plan, given, outputs, scratch)
