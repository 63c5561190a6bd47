"""Attention for NVIDIA GPUs, in Triton through jax-triton: what JAX sees of it.

Kernels are in `triton_kernels`, their launches in `triton_plan`. To import this, no Triton is needed.
"""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels.attention import triton_plan
from lcx_kernels.attention.arguments import Arguments, Static, delta_of
from lcx_kernels.attention.triton_plan import Launch
from lcx_kernels.residuals import named
from lcx_kernels.triton_launch import call, require
from lcx_kernels.varying import vary_alike, vary_as


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


def gradients(arguments: Arguments, static: Static, log_sum_exp, d_out, delta) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) of `api.attention_gradients`, from the log-sum-exp of any backend.

    Raises:
      BackendUnavailable: a package is missing.
    """
    require()
    return triton_plan.backward(run, arguments, static, *vary_alike((log_sum_exp, d_out, delta)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, arguments: Arguments):
    return tuple(triton_plan.forward(run, arguments, static))


def _forward(static, arguments):
    results = _attention(static, arguments)
    return results, (arguments, results)


def _backward(static, residuals, cotangents):
    arguments, results = residuals
    delta = delta_of(results, cotangents)
    found = gradients(arguments, static, results[1], cotangents[0], delta)
    return (Arguments(*found, None, None, None, None),)


_attention.defvjp(named(_forward), _backward)


def run(launch: Launch) -> tuple[jax.Array, ...]:
    """The outputs of a launch, varying over mesh axes as its inputs do."""
    launch = launch._replace(inputs=vary_alike(launch.inputs))
    return vary_as(launch.inputs, _call(launch))


_call = functools.partial(call, "lcx_kernels.attention.triton_kernels")
