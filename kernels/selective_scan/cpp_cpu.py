"""The selective scan for CPUs in C++: what JAX sees of it. `cpp_kernels.cc` is compiled when it is first needed.

Bias and softplus of dt, skip and gate are computed inside, in the dtype of the arithmetic.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcx_kernels import cpp
from lcx_kernels.residuals import named
from lcx_kernels.selective_scan.arguments import Arguments
from lcx_kernels.varying import vary_alike, vary_as

SOURCE = cpp.Source("selective_scan/cpp_kernels.cc", ("lcx_selective_scan_forward", "lcx_selective_scan_backward"))

# Tokens between two states that are kept. A chunk's states and decays, recomputed, should stay in a core's cache.
_CHUNK_SIZE = 32
# Vectors of channels that a task has: together they are what memory gives at once. Fewer where tasks would be too few.
_BLOCKS = 8
_TASKS = 8


class Plan(NamedTuple):
    """What is known while tracing."""

    chunk_size: int
    blocks: int  # vectors of channels that a task has
    softplus: bool
    given: int  # bits: which of C, D, z, dt_bias and reset are there


def scan(arguments: Arguments, dt_softplus: bool, chunk_size: int | None) -> tuple[jax.Array | None, jax.Array]:
    """The backend, as `arguments.around` describes it."""
    dtype, out_dtype = arguments.dtype, arguments.x.dtype
    optional = (arguments.C, arguments.D, arguments.z, arguments.dt_bias, arguments.reset)
    given = sum(1 << bit for bit, array in enumerate(optional) if array is not None)
    filled = [jnp.zeros(1, dtype) if array is None else array.astype(dtype) for array in arguments[:-1]]
    reset = jnp.zeros(1, bool) if arguments.reset is None else arguments.reset
    batch, time, channels = arguments.x.shape
    blocks = max(1, min(_BLOCKS, batch * _vectors(channels, dtype) // _TASKS))
    plan = Plan(min(chunk_size or _CHUNK_SIZE, time), blocks, dt_softplus, given)
    y, final = _scan(plan, *vary_alike((*filled, reset)))
    return None if arguments.C is None else y.astype(out_dtype), final


def _vectors(channels: int, dtype: jnp.dtype) -> int:
    return -(-channels * jnp.dtype(dtype).itemsize // cpp.VECTOR_BYTES)


def _call(name: str, outputs: list[tuple[int, ...]], plan: Plan, arrays: tuple, **attributes) -> tuple:
    dtype = arrays[0].dtype
    call = jax.ffi.ffi_call(name, [jax.ShapeDtypeStruct(shape, dtype) for shape in outputs], vmap_method="sequential")
    known = dict(chunk=np.int64(plan.chunk_size), blocks=np.int64(plan.blocks), given=np.int64(plan.given))
    return vary_as(arrays, call(*arrays, **known, softplus=plan.softplus, **attributes))


def _run(plan: Plan, arrays: tuple, keep: bool) -> tuple:
    """y (of one number where C is not given), the final state and, to keep, the states at the chunks' borders."""
    x, state = arrays[0], arrays[8].shape
    lanes = cpp.VECTOR_BYTES // x.dtype.itemsize
    chunks, blocks = -(-x.shape[1] // plan.chunk_size), _vectors(x.shape[2], x.dtype)
    outputs = [x.shape if plan.given & 1 else (1,), state]
    outputs += [(x.shape[0], chunks, blocks, state[2], lanes)] if keep else []
    return _call("lcx_selective_scan_forward", outputs, plan, arrays, keep=keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """arrays: as of `Arguments`, all of one dtype, with one number for what is not given."""
    return _run(plan, arrays, keep=False)


def _forward(plan: Plan, *arrays: jax.Array) -> tuple:
    y, final, borders = _run(plan, arrays, keep=True)
    return (y, final), (arrays, borders)


def _backward(plan: Plan, residuals: tuple, cotangents: tuple) -> tuple:
    arrays, borders = residuals
    x, A, B, z, initial = (arrays[i] for i in (0, 2, 3, 6, 8))
    batch, _, channels = x.shape
    groups = -(-_vectors(channels, x.dtype) // plan.blocks)
    parts = {"A": (batch, *A.shape), "shared": (groups, *B.shape), "channel": (batch, channels)}
    outputs = [x.shape, x.shape, z.shape, initial.shape, parts["A"], parts["shared"]]
    outputs += [parts["shared"] if plan.given & 1 else (1, *arrays[4].shape), parts["channel"], parts["channel"]]
    found = _call("lcx_selective_scan_backward", outputs, plan, vary_alike((*arrays, borders, *cotangents)))
    dx, d_dt, dz, d_initial, *sums = found
    dA, dB, dC, dD, d_bias = (jnp.sum(part, axis=0) for part in sums)
    gradients = [dx, d_dt, dA, dB, dC, dD, dz, d_bias, d_initial]
    # What is not given has no gradient, and what the kernel leaves there is of no meaning.
    given = [True, True, True, True, *(bool(plan.given >> bit & 1) for bit in range(4)), True]
    gradients = [g if there else jnp.zeros_like(a) for g, a, there in zip(gradients, arrays, given, strict=False)]
    return (*gradients, None)


_scan.defvjp(named(_forward), _backward)
