"""Attention for NVIDIA GPUs, in Triton through jax-triton: what JAX sees of it.

Kernels are in `triton_kernels`, their launches in `triton_plan`. To import this, no Triton is needed.
"""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels.attention import triton_plan
from lcx_kernels.attention.arguments import Arguments, Static
from lcx_kernels.attention.triton_plan import Launch
from lcx_kernels.triton_launch import call, require, vary_as
from lcx_kernels.varying import vary_alike


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why these kernels cannot do a call, or None."""
    del static
    if arguments.q.dtype == jnp.float64:
        return "it computes in float32, and q is float64"
    width = max(arguments.q.shape[3], arguments.v.shape[3])
    if width > triton_plan.LARGEST_WIDTH:
        return f"heads of {width} numbers, and it takes at most {triton_plan.LARGEST_WIDTH}"
    if 0 in arguments.q.shape + arguments.v.shape:
        return "there is an axis of size 0"
    return None


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V] in q.dtype, log_sum_exp float32 [batch, time, heads]).

    Raises:
      BackendUnavailable: a package is missing.
    """
    require()
    return _attention(static, vary_alike(arguments))


def backward(static: Static, arguments: Arguments, results: tuple, cotangents: tuple) -> tuple:
    """The gradients (dq, dk, dv), given both results of any backend and their cotangents."""
    arguments, results, cotangents = vary_alike((arguments, results, cotangents))
    return triton_plan.backward(run, arguments, static, results, cotangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, arguments: Arguments):
    return tuple(triton_plan.forward(run, arguments, static))


def _forward(static, arguments):
    results = _attention(static, arguments)
    return results, (arguments, results)


def _backward(static, residuals, cotangents):
    gradients = backward(static, *residuals, cotangents)
    return (Arguments(*gradients, None, None, None, None),)


_attention.defvjp(_forward, _backward)


def run(launch: Launch) -> tuple[jax.Array, ...]:
    """The outputs of a launch, varying over mesh axes as its inputs do."""
    launch = launch._replace(inputs=vary_alike(launch.inputs))
    return vary_as(launch.inputs, _call(launch))


_call = functools.partial(call, "lcx_kernels.attention.triton_kernels")
