"""The selective scan for NVIDIA GPUs, in Triton through jax-triton: what JAX sees of it.

Kernels are in `triton_kernels`, their launches in `triton_plan`. To import this, no Triton is needed.
"""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels.residuals import named
from lcx_kernels.selective_scan import triton_plan
from lcx_kernels.selective_scan.arguments import Arguments
from lcx_kernels.selective_scan.triton_plan import Inputs, Launch, Plan
from lcx_kernels.triton_launch import call
from lcx_kernels.triton_launch import require as require
from lcx_kernels.varying import vary_alike, vary_as


def scan(arguments: Arguments, dt_softplus: bool, chunk_size: int | None) -> tuple[jax.Array | None, jax.Array]:
    """The backend, as `arguments.around` describes it. ``chunk_size`` is an upper limit here."""
    batch, time, channels = arguments.x.shape
    state = arguments.A.shape[1]
    reset = None if arguments.reset is None else arguments.reset.astype(jnp.int8)
    inputs = Inputs(*vary_alike(tuple(arguments._replace(reset=reset))))
    plan = triton_plan.make_plan(batch, time, channels, state, arguments.dtype == jnp.float64, chunk_size)
    return _scan(plan, dt_softplus, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(plan: Plan, dt_softplus: bool, inputs: Inputs):
    y, final, _ = triton_plan.forward(run, inputs, dt_softplus, plan, keep=False)
    return y, final


def _forward(plan, dt_softplus, inputs):
    y, final, borders = triton_plan.forward(run, inputs, dt_softplus, plan, keep=True)
    return (y, final), (inputs, borders)


def _backward(plan, dt_softplus, residuals, cotangents):
    inputs, borders = residuals
    gradients = triton_plan.backward(run, inputs, dt_softplus, plan, borders, *cotangents)

    def as_given(array, gradient):
        if array is None or array.dtype == jnp.int8:
            return None
        return jnp.zeros_like(array) if gradient is None else gradient.astype(array.dtype)

    return (Inputs(*map(as_given, inputs, gradients)),)


_scan.defvjp(named(_forward), _backward)


def run(launch: Launch) -> tuple[jax.Array, ...]:
    """The outputs of a launch, varying over mesh axes as its inputs do."""
    return vary_as(launch.inputs, _call(launch))


_call = functools.partial(call, "lcx_kernels.selective_scan.triton_kernels")
