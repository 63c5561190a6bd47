"""The chunked memory with a decay a key channel on NVIDIA GPUs: launches, and what JAX sees of them.

The phases are those of `triton_gpu`: states before all chunks, then what all tokens read at once; in the backward pass
the gradients of the states after all chunks, then those of all tokens. The kernels are in `triton_channel_kernels`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.arguments import Arguments, spread
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.chunked_memory.triton_plan import (
    Inputs,
    Launch,
    Plan,
    carried_blocks,
    padded,
    present,
    programs,
    summed,
)
from lcx_kernels.residuals import named

Run = Callable[[Launch], tuple[jax.Array, ...]]


def scan(run: Run, plan: Plan, arguments: Arguments) -> tuple[jax.Array | None, SegmentState]:
    """The backend for an inclusive, linear memory without a normaliser; every head gets queries and keys of its own."""
    heads, reset = arguments.heads, arguments.reset
    q, k, v = (None if array is None else spread(array, heads) for array in arguments[:3])
    inputs = Inputs(q, k, v, arguments.log_decay, None if reset is None else reset.astype(jnp.int8))
    out, memory = _scan(run, plan, inputs, arguments.state.memory)
    return out, SegmentState(memory, None, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(run: Run, plan: Plan, inputs: Inputs, state: jax.Array):
    return _forward(run, plan, inputs, state)[0]


def _forward(run: Run, plan: Plan, inputs: Inputs, state: jax.Array):
    reads = inputs.q is not None
    borders, final = _states(run, plan, inputs, state, keep=reads)
    out = run(_outputs(plan, inputs, borders))[0] if reads else None
    return (out, final), (inputs, state)


def _backward(run: Run, plan: Plan, residuals, cotangents):
    inputs, state = residuals
    dy, d_final = cotangents
    if inputs.q is None:  # queries of zeros, which have no gradient
        inputs = inputs._replace(q=jnp.zeros_like(inputs.k))
        dy = jnp.zeros_like(inputs.v)
    borders, _ = _states(run, plan, inputs, state, keep=True)
    late, d_state = _states(run, plan, inputs, d_final, keep=True, dy=dy)
    (dv,) = run(_value_gradients(plan, inputs, dy, late))
    dq, dk, da = run(_key_gradients(plan, inputs, dy, borders, late))
    gradients = Inputs(dq if residuals[0].q is not None else None, dk, dv, da.astype(inputs.log_decay.dtype), None)
    return gradients, d_state.astype(state.dtype)


_scan.defvjp(named(_forward), _backward)


def _states(run: Run, plan: Plan, inputs: Inputs, edge: jax.Array, *, keep: bool, dy: Any = None):
    """The states before all chunks, if ``keep``, and the final one; with ``dy`` the gradients, from the end."""
    start, final = edge[:, None], None
    if plan.spans > 1:
        _, ends, elapsed, kept = run(_carry(plan, inputs, None, dy, keep=False))
        start, final = _between_spans(edge, ends, elapsed, kept, reverse=dy is not None)
        if not keep:
            return None, final
    borders, ends, _, _ = run(_carry(plan, inputs, start, dy, keep=keep))
    return borders, ends[:, 0] if final is None else final


def _between_spans(edge: jax.Array, ends, elapsed, kept, *, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """What each span starts from, [batch, spans, heads, K, V], and what the last one leaves."""

    def step(state, span):
        end, elapsed, kept = span
        lasting = jnp.exp(elapsed)[..., None] * state
        return jnp.where(kept[..., None, None] > 0, lasting, 0) + end, state

    spans = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (ends, elapsed, kept))
    final, starts = jax.lax.scan(step, edge, spans, reverse=reverse)
    return jnp.moveaxis(starts, 0, 1), final


# The launches.


def _constants(plan: Plan, inputs: Inputs, block_k: int, block_v: int) -> dict[str, Any]:
    shape = plan.shape
    sizes = {"HEADS": shape.heads, "K": shape.K, "V": shape.V, "BLOCK_K": block_k, "BLOCK_V": block_v}
    return {"HAS_RESET": inputs.reset is not None, "NARROW": plan.narrow, "C": plan.chunk} | sizes


def _dtype(plan: Plan) -> Any:
    """Of states between chunks."""
    return jnp.bfloat16 if plan.narrow else jnp.float32


def _carry(plan: Plan, inputs: Inputs, start: Any, dy: Any, *, keep: bool) -> Launch:
    """The states through time; without ``start`` what each span makes of nothing."""
    shape, summary, back = plan.shape, start is None, dy is not None
    per_span, state = (shape.batch, plan.spans, shape.heads), (shape.K, shape.V)
    x, y = (inputs.q, dy) if back else (inputs.k, inputs.v)
    nothing = ((1,), jnp.float32)
    block_k, block_v = min(64, padded(shape.K)), min(64, padded(shape.V))
    return Launch(
        "channel_carry",
        programs(math.prod(per_span) * math.prod(carried_blocks(shape))),
        _warps(plan),
        present((x, y, inputs.log_decay, inputs.reset, start), x),
        (shape.time, plan.length, plan.spans),
        (
            ((shape.batch, plan.chunks, shape.heads, *state), _dtype(plan)) if keep else nothing,
            ((*per_span, *state), jnp.float32),
            ((*per_span, shape.K), jnp.float32) if summary else nothing,
            (per_span, jnp.float32) if summary else nothing,
        ),
        {"BACK": back, "KEEP": keep, "SUMMARY": summary} | _constants(plan, inputs, block_k, block_v),
    )


def _of_chunks(kernel: str, plan: Plan, inputs: Inputs, arrays: tuple, outputs: tuple, blocks: int, *sizes) -> Launch:
    shape = plan.shape
    count = programs(shape.batch * plan.chunks * shape.heads * blocks)
    arrays = present(arrays, inputs.k)
    constants = _constants(plan, inputs, *sizes) | {"LEVELS": plan.chunk.bit_length() - 1}
    return Launch(kernel, count, _warps(plan), arrays, (shape.time,), outputs, constants)


def _warps(plan: Plan) -> int:
    return 8 if plan.chunk >= 64 else 4


def _block(width: int, largest: int = 32) -> int:
    """Channels of keys that a program takes at once: several arrays [chunk, channels] are in registers together."""
    return min(largest, padded(width))


def _outputs(plan: Plan, inputs: Inputs, borders: Any) -> Launch:
    shape, block = plan.shape, min(64, padded(plan.shape.V))
    out = (((shape.batch, shape.time, shape.heads, shape.V), inputs.v.dtype),)
    blocks = math.ceil(shape.V / block)
    return _of_chunks("channel_outputs", plan, inputs, (*inputs, borders), out, blocks, _block(shape.K), block)


def _value_gradients(plan: Plan, inputs: Inputs, dy: Any, late: Any) -> Launch:
    shape, block = plan.shape, min(64, padded(plan.shape.V))
    arrays = (inputs.q, inputs.k, inputs.log_decay, inputs.reset, dy, late)
    outputs, blocks = ((inputs.v.shape, inputs.v.dtype),), math.ceil(shape.V / block)
    return _of_chunks("channel_value_gradients", plan, inputs, arrays, outputs, blocks, _block(shape.K), block)


def _key_gradients(plan: Plan, inputs: Inputs, dy: Any, borders: Any, late: Any) -> Launch:
    shape, block = plan.shape, _block(plan.shape.K, 16 if plan.narrow else 32)
    arrays = (*inputs, dy, borders, late)
    outputs = tuple((inputs.k.shape, dtype) for dtype in (inputs.q.dtype, inputs.k.dtype, jnp.float32))
    blocks = math.ceil(shape.K / block)
    return _of_chunks("channel_key_gradients", plan, inputs, arrays, outputs, blocks, block, summed(shape.V))
