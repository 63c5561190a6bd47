"""The chunked memory for NVIDIA GPUs, in Triton through jax-triton: what JAX sees of it.

Kernels are in `triton_kernels`, their launches in `triton_plan` (of segments in `triton_segments`, of a decay a key
channel in `triton_channels`). To import this, no Triton is needed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory import triton_channels, triton_plan, triton_segments
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.chunked_memory.triton_plan import Cotangents, Inputs, Launch, Plan
from lcx_kernels.residuals import named
from lcx_kernels.triton_launch import call, require
from lcx_kernels.varying import vary_alike, vary_as


def refusal(arguments: Arguments, static: Static) -> str | None:
    """What of a call these kernels do not offer, in words; None where they offer it."""
    if arguments.dtype == jnp.float64:
        return "float64"
    if max(arguments.k.shape[-1], arguments.v.shape[-1]) > triton_plan.LARGEST_WIDTH:
        return f"keys or values wider than {triton_plan.LARGEST_WIDTH}"
    if static.segmented and static.read == "inclusive":
        return f"update {static.update} with inclusive reads"
    if static.segmented and arguments.log_decay is not None:
        return "segments with a decay"
    if static.update == "delta_rule" and (arguments.q is None or arguments.q.shape[2] > arguments.heads):
        return "the delta rule without queries, or with more heads of them than memories"
    if _by_channel(arguments):
        if static.update == "delta_rule" or static.normalize:
            return "a decay for each key channel, but for linear memories without a normaliser"
        if arguments.q is not None and arguments.q.shape[2] > arguments.heads:
            return "a decay for each key channel, with more heads of queries than memories"
    return None


def _by_channel(arguments: Arguments) -> bool:
    return arguments.log_decay is not None and arguments.log_decay.ndim == 4


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """The backend, as `reference.scan`; ``chunk_size`` is an upper limit.

    Raises:
      BackendUnavailable: a package is missing.
    """
    require()
    q, k, v = arguments.q, arguments.k, arguments.v
    batch, time, k_heads, width = k.shape
    q_heads = k_heads if q is None else q.shape[2]
    shape = triton_plan.Shape(batch, time, arguments.heads, q_heads, k_heads, v.shape[2], width, v.shape[3])
    narrow = all(array is None or array.dtype == jnp.bfloat16 for array in (q, k, v))
    if static.segmented:
        segments = triton_plan.segments_plan(shape, narrow, static.chunk_size)
        return triton_segments.scan(run, segments, vary_alike(arguments), static.update == "segment_delta")
    plan = triton_plan.make_plan(shape, narrow, static.chunk_size)
    if _by_channel(arguments):
        return triton_channels.scan(run, plan, vary_alike(arguments))
    reset = None if arguments.reset is None else arguments.reset.astype(jnp.int8)
    inputs = Inputs(q, k, v, arguments.log_decay, reset)
    state, beta = _State(arguments.state.memory, arguments.state.normalizer), arguments.beta
    inputs, state, beta = vary_alike((inputs, state, beta))
    if static.update == "delta_rule":
        out, memory = _delta(plan, inputs, beta, state.memory)
        return out, SegmentState(memory, None, None, None)
    out, state = _scan(plan, inputs, state)
    return out, SegmentState(state.memory, state.normalizer, None, None)


class _State(NamedTuple):
    """Memories [.., heads, K, V] and normalisers [.., heads, K] or None, or what is in their place."""

    memory: jax.Array | None
    normalizer: jax.Array | None

    @classmethod
    def of(cls, normalize: bool, memory, normalizer) -> "_State":
        return cls(memory, normalizer if normalize else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, inputs: Inputs, state: _State):
    return _forward(plan, inputs, state)[0]


def _dtypes(plan: Plan) -> tuple:
    return (jnp.bfloat16 if plan.narrow else jnp.float32), jnp.float32


def _forward(plan, inputs, state):
    normalize = state.normalizer is not None
    if inputs.q is None:
        return (None, _states(plan, inputs, state, keep=False)[1]), (inputs, state, None, None)
    borders, final = _states(plan, inputs, state, keep=True)
    dtypes = inputs.v.dtype, jnp.float32
    out, denominator = run(triton_plan.outputs(plan, inputs, normalize, borders, dtypes))
    residuals = (inputs, state, out, denominator) if normalize else (inputs, state, None, None)
    return (out, final), residuals


def _states(plan: Plan, inputs: Inputs, edge: _State, *, keep: bool, **of_gradient) -> tuple[_State, _State]:
    """The states before all chunks, [batch, chunks, heads, ..], if ``keep``, and the final one.

    With ``of_gradient`` the gradients of the states after all chunks, and of the initial one; see `triton_plan.carry`.
    """
    normalize = edge.normalizer is not None
    launch = functools.partial(triton_plan.carry, plan, inputs, normalize, dtypes=_dtypes(plan), **of_gradient)
    start, final = jax.tree.map(lambda array: array[:, None], edge), None
    if plan.spans > 1:
        _, _, *ends, elapsed, kept = run(launch(start=(None, None), keep=False, summary=True))
        ends = _State.of(normalize, *ends)
        start, final = _between_spans(edge, ends, elapsed, kept, reverse="dy" in of_gradient)
        if not keep:
            return None, final
    *borders, memory, normalizer, _, _ = run(launch(start=start, keep=keep, summary=False))
    if final is None:
        final = jax.tree.map(lambda array: array[:, 0], _State.of(normalize, memory, normalizer))
    return _State.of(normalize, *borders), final


def _between_spans(edge: _State, ends: _State, elapsed, kept, *, reverse: bool) -> tuple[_State, _State]:
    """What each span starts from, [batch, spans, heads, ..], and what the last one leaves."""

    def step(state, span):
        ends, elapsed, kept = span

        def after(state, end):
            tail = (1,) * (end.ndim - elapsed.ndim)
            lasting = jnp.exp(elapsed).reshape(*elapsed.shape, *tail) * state
            return jnp.where(kept.reshape(*kept.shape, *tail) > 0, lasting, 0) + end

        return jax.tree.map(after, state, ends), state

    spans = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (ends, elapsed, kept))
    final, starts = jax.lax.scan(step, edge, spans, reverse=reverse)
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), starts), final


def _backward(plan, residuals, cotangents):
    inputs, state, out, denominator = residuals
    dy, d_final = cotangents
    normalize = state.normalizer is not None
    if inputs.q is None:
        # Nothing is read: queries of zeros, which have no gradient.
        inputs = inputs._replace(q=jnp.zeros_like(inputs.k))
        dy = jnp.zeros_like(inputs.v, shape=(*inputs.v.shape[:2], plan.shape.lanes, plan.shape.V))
        out, denominator = dy, jnp.ones_like(dy[..., 0], jnp.float32)
    weights = None, None
    if normalize:
        products = jnp.sum(dy.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        weights = 1 / denominator, -products / denominator
    borders, _ = _states(plan, inputs, state, keep=True)
    late, d_state = _states(plan, inputs, d_final, keep=True, dy=dy, weights=weights)
    around = inputs, normalize, Cotangents(dy, weights, borders, late), jnp.float32
    dv, da = run(triton_plan.value_gradients(plan, *around))
    dq, dk = run(triton_plan.key_gradients(plan, *around))
    return Inputs(*map(_added_up, residuals[0], (dq, dk, dv, da, None))), jax.tree.map(
        lambda gradient, array: gradient.astype(array.dtype), d_state, state
    )


def _added_up(array: jax.Array | None, parts: jax.Array | None, dtype=None) -> jax.Array | None:
    """The gradient of an array [batch, time, heads, ..] from those of a multiple of its heads."""
    if array is None or parts is None:
        return None
    heads = array.shape[2]
    if parts.shape[2] != heads:
        parts = parts.reshape(*parts.shape[:2], heads, -1, *parts.shape[3:]).sum(axis=3)
    return parts.astype(dtype or array.dtype)


_scan.defvjp(named(_forward), _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta(plan: Plan, inputs: Inputs, beta: jax.Array, state: jax.Array):
    return _delta_forward(plan, inputs, beta, state)[0]


def _written(plan: Plan, inputs: Inputs, beta, state):
    """What the delta rule writes in place of the values, and from what."""
    inverse, w, u = run(triton_plan.solve(plan, inputs, beta, _dtypes(plan)))
    launch = triton_plan.carry_delta(plan, inputs, (u, w, None), state, _dtypes(plan), back=False)
    borders, final, u = run(launch)
    return inverse, w, u, borders, final


def _per_memory(plan: Plan) -> Plan:
    """The plan of a linear memory of what the delta rule writes."""
    return plan._replace(shape=plan.shape._replace(v_heads=plan.shape.heads))


def _delta_forward(plan, inputs, beta, state):
    _, _, u, borders, final = _written(plan, inputs, beta, state)
    dtypes = inputs.v.dtype, jnp.float32
    launch = triton_plan.outputs(_per_memory(plan), inputs._replace(v=u), False, (borders, None), dtypes)
    return (run(launch)[0], final), (inputs, beta, state)


def _delta_backward(plan, residuals, cotangents):
    """Tokens read twice: by their queries, and by their keys what is to be corrected, whose gradient is -dv."""
    inputs, beta, state = residuals
    dy, d_final = cotangents
    dtypes, linear = _dtypes(plan), _per_memory(plan)
    inverse, w, u, borders, _ = _written(plan, inputs, beta, state)
    written = inputs._replace(v=u)
    of_reads = Cotangents(dy, (None, None), (borders, None), (None, None))
    local, _ = run(
        triton_plan.value_gradients(linear, written, False, of_reads, dtypes[1], of_decay=False, partial=dtypes[0])
    )
    late, d_state, du = run(triton_plan.carry_delta(plan, inputs, (dy, w, local), d_final, dtypes, back=True))
    dv, dbeta = run(triton_plan.corrections(plan, inputs, beta, inverse, u, du, borders, dtypes))

    reads = written, False, of_reads._replace(late=(late, None)), dtypes[1]
    _, da = run(triton_plan.value_gradients(linear, *reads, of_values=False))
    dq, dk = run(triton_plan.key_gradients(linear, *reads, partial=True))
    shape = linear.shape._replace(q_heads=linear.shape.k_heads)
    by_keys = linear._replace(shape=shape)
    corrected = written._replace(q=inputs.k), False, of_reads._replace(dy=dv), dtypes[1]
    _, da_of_keys = run(triton_plan.value_gradients(by_keys, *corrected, of_values=False, correcting=True))
    parts = run(triton_plan.key_gradients(by_keys, *corrected, correcting=True, partial=True))
    dk = sum(_added_up(inputs.k, part, jnp.float32) for part in (dk, *parts)).astype(inputs.k.dtype)
    da = None if inputs.log_decay is None else _added_up(inputs.log_decay, da + da_of_keys)
    gradients = Inputs(_added_up(inputs.q, dq), dk, _added_up(inputs.v, dv), da, None)
    return gradients, dbeta.astype(beta.dtype), d_state.astype(state.dtype)


_delta.defvjp(named(_delta_forward), _delta_backward)


def run(launch: Launch) -> tuple[jax.Array, ...]:
    """The outputs of a launch, varying over mesh axes as its inputs do."""
    return vary_as(launch.inputs, _call(launch))


_call = functools.partial(call, "lcx_kernels.chunked_memory.triton_kernels")
