"""Attention by cuDNN on NVIDIA GPUs, through the function behind `jax.nn.dot_product_attention`.

The public one rounds the log-sum-exp to the dtype of the queries, which is too coarse to merge partial results or sinks
by. cuDNN's backward pass takes no cotangent of the log-sum-exp: where there is one, Triton's kernels take over, which
need of the forward pass only its two results.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lcx_kernels.attention import triton_gpu
from lcx_kernels.attention.arguments import Arguments, Static, delta_of
from lcx_kernels.residuals import named
from lcx_kernels.varying import vary_alike

LARGEST_WIDTH = 128


def installed() -> bool:
    """Whether JAX finds cuDNN."""
    from jax._src.lib import cuda_versions

    return cuda_versions is not None


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why cuDNN cannot do a call, or None."""
    q, k, v = arguments[:3]
    width, value_width = q.shape[3], v.shape[3]
    reasons = {
        f"it takes bfloat16 and float16, and q is {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
        "it has no segment_ids": arguments.query_segment is not None,
        "it has no positions": static.offset is None,
        "it has no softcap": static.softcap is not None,
        "it has a window only under a causal mask": static.window is not None and not static.causal,
        "it takes as many keys as queries": q.shape[1] != k.shape[1],
        f"heads must be {LARGEST_WIDTH} wide at most, a multiple of 8, for keys and values alike, and are {width} and "
        f"{value_width}": width != value_width or width % 8 or width > LARGEST_WIDTH,
        "without a causal mask it takes an even number of tokens": not static.causal and q.shape[1] % 2,
        "there is an axis of size 0": 0 in q.shape,
        "JAX finds no cuDNN": not installed(),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V] in q.dtype, log_sum_exp float32 [batch, time, heads])."""
    time = arguments.q.shape[1]
    # It takes even numbers of tokens. A causal mask hides a last one from all others.
    padding = [(0, 0), (0, time % 2), (0, 0), (0, 0)]
    results = _attention(static, *(jnp.pad(array, padding) for array in vary_alike(arguments[:3])))
    return tuple(result[:, :time] for result in results)


gradients = triton_gpu.gradients  # cuDNN has no name for delta, and the log-sum-exp is all that the others need


def _results(static: Static, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    out, log_sum_exp = fused.dot_product_attention(
        q,
        k,
        v,
        scale=static.scale,
        mask_type=fused.MaskType.CAUSAL if static.causal else fused.MaskType.NO_MASK,
        sliding_window_length=static.window,
        return_residual=True,
    )
    return out, jnp.swapaxes(log_sum_exp, 1, 2).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q: jax.Array, k: jax.Array, v: jax.Array):
    return _results(static, q, k, v)


def _forward(static: Static, *primals: Any):
    q, k, v = (primal.value for primal in primals)
    results, pull = jax.vjp(functools.partial(_results, static), q, k, v)
    return results, (q, k, v, results, pull)


def _backward(static: Static, residuals: tuple, cotangents: tuple):
    q, k, v, results, pull = residuals
    zeros = [jnp.zeros_like(result) for result in results]
    d_out, d_log_sum_exp = (
        zero if isinstance(cotangent, SymbolicZero) else cotangent
        for zero, cotangent in zip(zeros, cotangents, strict=True)
    )
    if isinstance(cotangents[1], SymbolicZero):
        return pull((d_out, zeros[1]))
    delta = delta_of(results, (d_out, d_log_sum_exp))
    return gradients(Arguments(q, k, v, None, None, None, None), static, results[1], d_out, delta)


_attention.defvjp(named(_forward), _backward, symbolic_zeros=True)
