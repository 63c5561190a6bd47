"""The depthwise causal convolution for CPUs in C++: what JAX sees of it. `cpp_kernels.cc` is compiled when needed."""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels import cpp
from lcx_kernels.causal_conv.taps import add_last, last_tokens
from lcx_kernels.varying import vary_alike, vary_as

SOURCE = cpp.Source("causal_conv/cpp_kernels.cc", ("lcx_causal_conv_forward", "lcx_causal_conv_backward"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    silu: bool, x: jax.Array, tail: jax.Array, weight: jax.Array, bias: jax.Array, lookback: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The convolution; see `reference.convolve`."""
    (y,) = _call("lcx_causal_conv_forward", silu, [x.shape], x, tail, weight, bias, lookback)
    return y.astype(x.dtype), last_tokens(x, tail)


def _forward(silu, x, tail, weight, bias, lookback):
    return convolve(silu, x, tail, weight, bias, lookback), (x, tail, weight, bias, lookback)


def _backward(silu, residuals, cotangents):
    x, tail, weight, bias, _ = residuals
    dy, d_last = cotangents
    rows = x.shape[:1]
    outputs = [x.shape, tail.shape, rows + weight.shape, rows + bias.shape]
    found = _call("lcx_causal_conv_backward", silu, outputs, *residuals, dy.astype(weight.dtype))
    dx, d_tail, d_weight, d_bias = found
    dx, d_tail = add_last(dx.astype(x.dtype), d_tail.astype(tail.dtype), d_last)
    return dx, d_tail, jnp.sum(d_weight, axis=0), jnp.sum(d_bias, axis=0), None


convolve.defvjp(_forward, _backward)


def _call(name: str, silu: bool, outputs: list[tuple[int, ...]], x, tail, weight, bias, lookback, *more) -> tuple:
    limits = jnp.zeros(1, jnp.int32) if lookback is None else lookback.astype(jnp.int32)
    arrays = vary_alike((x.astype(weight.dtype), tail.astype(weight.dtype), weight, bias, limits, *more))
    declared = [jax.ShapeDtypeStruct(shape, weight.dtype) for shape in outputs]
    call = jax.ffi.ffi_call(name, declared, vmap_method="sequential")
    return vary_as(arrays, call(*arrays, silu=silu, has_lookback=lookback is not None))
