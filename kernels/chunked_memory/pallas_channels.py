"""A decay a key channel on TPU, gated linear attention: the calls.

What the kernels compute is told in pallas_channels_kernels.py. The grid and the layout of arrays are those of
pallas_inclusive.py; every head has queries and keys of its own.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl

from lcx_kernels.backends import is_interpreted
from lcx_kernels.chunked_memory.arguments import Arguments, Static, spread
from lcx_kernels.chunked_memory.pallas_channels_kernels import Plan, backward_kernel, forward_kernel
from lcx_kernels.chunked_memory.pallas_inclusive import documents_by_chunk
from lcx_kernels.chunked_memory.pallas_tiles import (
    LANES,
    SUBLANES,
    Lanes,
    call,
    flat,
    flat_state,
    heads_of_state,
    narrowed,
    round_up,
    share,
    widened,
)
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.residuals import named

_LONGEST = 128  # tokens of a chunk at most
_TILES = 4  # of a program


class _Inputs(NamedTuple):
    """What the kernels read; absent where the call has none."""

    q: jax.Array | None  # [batch, time, heads * K]
    k: jax.Array
    v: jax.Array  # [batch, time, heads * V]
    decay: jax.Array  # [batch, time, heads * K]
    document: jax.Array | None  # as of pallas_inclusive
    memory: jax.Array  # [batch, K, heads * V]


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why this file cannot do a call with a decay a key channel, or None."""
    if static.update == "delta_rule" or static.normalize:
        return "a decay by key channel only for linear memories without a normaliser"
    if arguments.q is not None and arguments.q.shape[2] > arguments.heads:
        return "no more heads of queries than memories"
    if max(arguments.k.shape[3], arguments.v.shape[3]) > LANES:
        return f"with a decay by key channel, keys and values of at most {LANES}"
    return None


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """The backend for calls without `refusal`."""
    plan = _plan(arguments, static)
    out, memory = _scan(plan, _inputs(plan, arguments))
    if out is not None:
        out = narrowed(out.reshape(plan.batch, plan.time, plan.heads, -1), plan.depth)
    return out, SegmentState(heads_of_state(memory, plan.heads, plan.width, plan.depth), None, None, None)


def _plan(arguments: Arguments, static: Static) -> Plan:
    batch, time, _, width = arguments.k.shape
    heads, depth = arguments.heads, arguments.v.shape[3]
    key, value = widened(width, heads), widened(depth, heads)
    count = 2 if min(key, value) < LANES else 1
    chunk = min(round_up(static.chunk_size, SUBLANES), _LONGEST, round_up(time, SUBLANES))
    return Plan(
        batch=batch,
        time=time,
        heads=heads,
        width=width,
        depth=depth,
        keys=Lanes(key, count),
        values=Lanes(value, count),
        tiles=share(batch, heads // count, _TILES),
        chunk=chunk,
        documents=arguments.reset is not None or time % chunk != 0,
        reads=arguments.q is not None,
        dtype=np.dtype(arguments.dtype),
        interpret=is_interpreted(),
    )


def _inputs(plan: Plan, arguments: Arguments) -> _Inputs:
    q, k, v = (None if array is None else spread(array, plan.heads) for array in arguments[:3])
    return _Inputs(
        q=flat(q, plan.keys.width),
        k=flat(k, plan.keys.width),
        v=flat(v, plan.values.width),
        decay=flat(arguments.log_decay, plan.keys.width),
        document=documents_by_chunk(plan, arguments) if plan.documents else None,
        memory=flat_state(arguments.state.memory, plan.keys, plan.values, plan.dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, inputs: _Inputs):
    found = _forward_call(plan, inputs, keep=False)
    return found.get("out"), found["memory"]


def _forward(plan: Plan, inputs: _Inputs):
    found = _forward_call(plan, inputs, keep=True)
    return (found.get("out"), found["memory"]), (inputs, found["borders"])


def _backward(plan: Plan, residuals, cotangents):
    found = _backward_call(plan, *residuals, *cotangents)
    return (_Inputs(document=None, **{name: found.get("d" + name) for name in ("q", "k", "v", "decay", "memory")}),)


_scan.defvjp(named(_forward), _backward)


class _Blocks:
    """Specs of blocks by kind of array; ``reverse`` goes through the chunks from the last to the first."""

    def __init__(self, plan: Plan, reverse: bool):
        last, rows, width = plan.chunks - 1, plan.chunk, plan.keys.width
        keys, values = plan.tiles * plan.keys.size, plan.tiles * plan.values.size

        def at(t):
            return last - t if reverse else t

        self.keys = pl.BlockSpec((None, rows, keys), lambda b, c, t: (b, at(t), c))
        self.values = pl.BlockSpec((None, rows, values), lambda b, c, t: (b, at(t), c))
        self.document = pl.BlockSpec((None, None, 1, rows), lambda b, c, t: (b, at(t), 0, 0))
        self.memory = pl.BlockSpec((None, width, values), lambda b, c, t: (b, 0, c))
        self.border = pl.BlockSpec((None, None, width, values), lambda b, c, t: (b, at(t), 0, c))

    def tokens(self, inputs: _Inputs) -> dict:
        """What both kernels read, by name: (array or None, spec)."""
        keys = {name: (getattr(inputs, name), self.keys) for name in ("q", "k", "decay")}
        return keys | {"v": (inputs.v, self.values), "document": (inputs.document, self.document)}


def _forward_call(plan: Plan, inputs: _Inputs, keep: bool) -> dict:
    """Returns out and the final state; to ``keep``, also the states that chunks start from."""
    blocks = _Blocks(plan, reverse=False)
    given = blocks.tokens(inputs) | {"initial": (inputs.memory, blocks.memory)}
    outputs = {"memory": (inputs.memory.shape, plan.dtype, blocks.memory)}
    if plan.reads:
        outputs["out"] = (inputs.v.shape, inputs.v.dtype, blocks.values)
    if keep:
        batch, *state = inputs.memory.shape
        outputs["borders"] = ((batch, plan.chunks, *state), plan.dtype, blocks.border)
    return call(forward_kernel, "gated_memory_forward", plan, given, outputs, {})


def _backward_call(plan: Plan, inputs: _Inputs, borders: jax.Array, dout: jax.Array | None, dmemory: jax.Array) -> dict:
    """Returns gradients by name."""
    blocks = _Blocks(plan, reverse=True)
    given = blocks.tokens(inputs) | {
        "borders": (borders, blocks.border),
        "dout": (dout, blocks.values),
        "dfinal": (dmemory, blocks.memory),
    }
    arrays = {"q": blocks.keys, "k": blocks.keys, "v": blocks.values, "decay": blocks.keys}
    outputs = {
        "d" + name: (getattr(inputs, name).shape, getattr(inputs, name).dtype, spec)
        for name, spec in arrays.items()
        if getattr(inputs, name) is not None
    }
    outputs["dmemory"] = (inputs.memory.shape, plan.dtype, blocks.memory)
    return call(backward_kernel, "gated_memory_backward", plan, given, outputs, {})
