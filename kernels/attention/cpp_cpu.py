"""Attention for CPUs in C++: what JAX sees of it. `cpp_kernels.cc` is compiled when it is first needed.

Scores exist for one block of queries and keys at a time, forward and backward; blocks that are hidden are skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcx_kernels import cpp
from lcx_kernels.attention.arguments import Arguments, Static, delta_of
from lcx_kernels.attention.visibility import sides
from lcx_kernels.residuals import named
from lcx_kernels.varying import vary_alike, vary_as

SOURCE = cpp.Source("attention/cpp_kernels.cc", ("lcx_attention_forward", "lcx_attention_backward"))

_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why these kernels cannot do a call, or None."""
    del static
    if 0 in arguments.q.shape + arguments.v.shape:
        return "there is an axis of size 0"
    return SOURCE.missing()


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V], log_sum_exp [batch, time, heads]), both at least float32."""
    return _attention(static, *_arrays(arguments), *_sight(arguments, static))


def gradients(arguments: Arguments, static: Static, log_sum_exp, d_out, delta) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) of `api.attention_gradients`."""
    q, k, v = _arrays(arguments)
    rows = log_sum_exp, d_out.astype(q.dtype), delta
    found = _gradients(static, (q, k, v), _sight(arguments, static), *rows)
    return tuple(x.astype(arguments.q.dtype) for x in found)


def _arrays(arguments: Arguments) -> tuple[jax.Array, ...]:
    wide = jnp.promote_types(arguments.q.dtype, jnp.float32)
    return tuple(x.astype(wide) for x in arguments[:3])


def _sight(arguments: Arguments, static: Static) -> tuple[jax.Array, ...]:
    """Who sees whom, int32: first, last and segment of queries [batch, time], index and segment of keys."""
    queries, keys = sides(arguments, static)
    fill = lambda x, value, length: jnp.broadcast_to(  # noqa: E731
        jnp.int32(value) if x is None else x, (arguments.q.shape[0], length)
    )
    time, held = arguments.q.shape[1], arguments.k.shape[1]
    of_queries = (queries.first, _LOWEST), (queries.last, _HIGHEST), (queries.segment, 0)
    of_keys = (keys.index, 0), (keys.segment, 0)
    return (*(fill(*side, time) for side in of_queries), *(fill(*side, held) for side in of_keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q, k, v, *sight):
    """q, k, v: of one dtype, float32 or float64."""
    shape = (*q.shape[:3], _whole(v).shape[3])
    found = _call("lcx_attention_forward", static, [shape, q.shape[:3]], (_whole(q), _whole(k), _whole(v), *sight))
    return found[0][..., : v.shape[3]], found[1]


def _forward(static: Static, q, k, v, *sight):
    results = _attention(static, q, k, v, *sight)
    return results, ((q, k, v), sight, results)


def _backward(static: Static, residuals, cotangents):
    arrays, sight, results = residuals
    found = _gradients(static, arrays, sight, results[1], cotangents[0], delta_of(results, cotangents))
    return (*found, *(None for _ in sight))


def _gradients(static: Static, arrays, sight, log_sum_exp, d_out, delta) -> tuple[jax.Array, ...]:
    whole = tuple(map(_whole, arrays))
    given = (*whole, *sight, log_sum_exp, _whole(d_out), delta)
    found = _call("lcx_attention_backward", static, [x.shape for x in whole], given)
    return tuple(x[..., : array.shape[3]] for x, array in zip(found, arrays, strict=True))


_attention.defvjp(named(_forward), _backward)


def _whole(x: jax.Array) -> jax.Array:
    """With heads of a whole number of vectors, filled up with zeros, which change no score."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[3] % (cpp.VECTOR_BYTES // x.dtype.itemsize))])


def _call(name: str, static: Static, outputs: list[tuple[int, ...]], arrays: tuple) -> tuple[jax.Array, ...]:
    arrays = vary_alike(arrays)
    declared = [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in outputs]
    call = jax.ffi.ffi_call(name, declared, vmap_method="sequential")
    return vary_as(arrays, call(*arrays, scale=np.float64(static.scale), softcap=np.float64(static.softcap or 0)))
