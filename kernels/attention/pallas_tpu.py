"""Attention on TPUs: the kernels of JAX's splash attention, with a log-sum-exp that can be differentiated.

Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) returns its log-sum-exp only where it is not
differentiated. Its backward kernels take out.d_out apart from the rest, as d_i in ds = p (dp - d_i); the derivative of
the log-sum-exp is p itself, so d_i less the cotangent of the log-sum-exp gives both gradients. The functions that hold
the kernels are private to JAX; all that is used of them is in `_Splash`.

Rows of the batch and key and value heads are vmapped, which makes them dimensions of the grid that cores share out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcx_kernels.attention.arguments import Arguments, Static, delta_of
from lcx_kernels.attention.visibility import NO_KEY_LOG_SUM_EXP
from lcx_kernels.backends import is_interpreted
from lcx_kernels.residuals import named
from lcx_kernels.varying import vary_alike, varying_axes

LANES = 128
LARGEST_BLOCK = 512
LARGEST_WIDTH = 256
# Pairs of blocks, of which scalar memory (1 MiB) keeps a number of two bytes and one of one byte.
LARGEST_TABLE = 2**18
# What splash attention gives hidden scores; a log-sum-exp below half of it is that of a query that sees no key.
MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why splash attention cannot do a call, or None."""
    q, v = arguments.q, arguments.v
    width = max(q.shape[3], v.shape[3])
    reasons = {
        f"it computes in float32, and q is {q.dtype}": q.dtype not in (jnp.float32, jnp.bfloat16),
        "it has no positions that are known only when running": static.offset is None,
        f"heads of {width} numbers, and it takes at most {LARGEST_WIDTH}": width > LARGEST_WIDTH,
        f"{q.shape[1]} queries would be padded to {LANES}": q.shape[1] < LANES,
        "there is an axis of size 0": 0 in q.shape + v.shape,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        return reason
    blocks, _ = _meetings(_plan(arguments, static), by_keys=False)
    if blocks.size > LARGEST_TABLE:
        return f"{blocks.shape[0]} blocks of queries meet up to {blocks.shape[1]} of keys, and scalar memory is small"
    return None


class Plan(NamedTuple):
    """What is known while tracing: the call, the lengths after padding, and whether segments are compared."""

    static: Static
    time: int
    keys: int
    block_q: int
    block_kv: int
    interpret: bool


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V] in q.dtype, log_sum_exp float32 [batch, time, heads]).

    ``chunk_size`` is an upper limit of blocks, from 128 on.
    """
    plan, time = _plan(arguments, static), arguments.q.shape[1]
    out, log_sum_exp = _attention(plan, *_laid_out(vary_alike(arguments), static, plan))
    return _rows(out, time), _rows(log_sum_exp[..., None], time)[..., 0]


def gradients(arguments: Arguments, static: Static, log_sum_exp, d_out, delta) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) of `api.attention_gradients`."""
    arguments, log_sum_exp, d_out, delta = vary_alike((arguments, log_sum_exp, d_out, delta))
    plan = _plan(arguments, static)
    (_, time, _, _), (_, keys, kv_heads, _) = arguments.q.shape, arguments.k.shape
    log_sum_exp, delta = (_by_head(x[..., None], plan.time, kv_heads)[..., 0] for x in (log_sum_exp, delta))
    d_out = _by_head(d_out.astype(arguments.q.dtype), plan.time, kv_heads)
    dq, dk, dv = _gradients(plan, *_laid_out(arguments, static, plan), log_sum_exp, d_out, delta)
    dq = (_rows(dq, time).astype(jnp.float32) * static.scale).astype(arguments.q.dtype)
    return dq, *(x.swapaxes(1, 2)[:, :keys] for x in (dk, dv))


def _laid_out(arguments: Arguments, static: Static, plan: Plan) -> tuple:
    """(scaled q, k, v, segments of queries and of keys) for `_attention`, padded."""
    q, k, v = arguments[:3]
    q = _by_head((q.astype(jnp.float32) * static.scale).astype(q.dtype), plan.time, k.shape[2])
    k, v = (_pad(x, plan.keys).swapaxes(1, 2) for x in (k, v))
    return q, k, v, *_segments(arguments, static, plan)


def _by_head(x: jax.Array, length: int, kv_heads: int) -> jax.Array:
    """[batch, time, heads, width] to [batch, n, g, length, width]."""
    batch, _, heads, width = x.shape
    return _pad(x, length).reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _rows(x: jax.Array, time: int) -> jax.Array:
    """The inverse of `_by_head`."""
    batch, n, g, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4)[:, :time].reshape(batch, time, n * g, width)


def _plan(arguments: Arguments, static: Static) -> Plan:
    blocks = [_block(array.shape[1], static.chunk_size) for array in arguments[:2]]
    lengths = (math.ceil(array.shape[1] / block) * block for array, block in zip(arguments[:2], blocks, strict=True))
    return Plan(static._replace(scale=1.0), *lengths, *blocks, is_interpreted())


def _block(length: int, chunk_size: int | None) -> int:
    """The largest of 128, 256, 512 that pads little and is not above the chunk size."""
    block = LARGEST_BLOCK
    while block > LANES and (length < 4 * block or (chunk_size is not None and block > chunk_size)):
        block //= 2
    return block


def _pad(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _segments(arguments: Arguments, static: Static, plan: Plan) -> tuple[jax.Array | None, jax.Array | None]:
    """Segments of queries and keys, padded; keys of the padding are of none. None where nothing needs them.

    Under a causal mask, keys of the padding are later than all queries that exist.
    """
    keys = arguments.k.shape[1]
    queries, of_keys = arguments.query_segment, arguments.key_segment
    if queries is None:
        if static.causal or plan.keys == keys:
            return None, None
        queries, of_keys = vary_alike((arguments.q[:, :, 0, 0] * 0, arguments.k[:, :, 0, 0] * 0))
        queries, of_keys = jnp.zeros_like(queries, jnp.int32), jnp.zeros_like(of_keys, jnp.int32)
    none = jnp.max(queries, axis=1, keepdims=True) + 1
    of_padding = jnp.broadcast_to(none, (none.shape[0], plan.keys - keys))
    return _pad(queries, plan.time), jnp.concatenate([of_keys, of_padding], axis=1)


# From here on q [batch, n, g, time, K], k and v [batch, n, keys, ...], out [batch, n, g, time, V].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, q, k, v, query_segment, key_segment):
    out, log_sum_exp = _Splash(plan).forward(q, k, v, query_segment, key_segment)
    blind = log_sum_exp < MASK_VALUE / 2
    return jnp.where(blind[..., None], 0, out), jnp.where(blind, NO_KEY_LOG_SUM_EXP, log_sum_exp)


def _forward(plan: Plan, *arrays):
    results = _attention(plan, *arrays)
    return results, (*arrays, *results)


def _backward(plan: Plan, residuals, cotangents):
    *arrays, out, log_sum_exp = residuals
    delta = delta_of((out, log_sum_exp), cotangents)
    return *_gradients(plan, *arrays, log_sum_exp, cotangents[0], delta), None, None


def _gradients(plan: Plan, q, k, v, query_segment, key_segment, log_sum_exp, d_out, delta):
    # Of a query without keys all weights are 0 again; its cotangents, however large, are left out.
    blind = log_sum_exp == NO_KEY_LOG_SUM_EXP
    d_out, delta = jnp.where(blind[..., None], 0, d_out), jnp.where(blind, 0, delta)
    return _Splash(plan).backward(q, k, v, query_segment, key_segment, log_sum_exp, d_out, delta)


_attention.defvjp(named(_forward), _backward)


def _meetings(plan: Plan, by_keys: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which block of the other side each step of a walk meets, and whether it meets any: [blocks, steps], integers.

    Splash attention finds out itself which blocks see each other, block by block, which takes longer than to compile.
    Walks end with their last block (`by_keys`) or begin with their first; idle steps name the block that comes next.
    """
    static = plan.static
    own, other = (plan.block_kv, plan.block_q) if by_keys else (plan.block_q, plan.block_kv)
    length, other_length = (plan.keys, plan.time) if by_keys else (plan.time, plan.keys)
    first = np.arange(0, length, own) + (-static.offset if by_keys else static.offset)  # in indices of the other side
    last = first + own - 1
    back = 0 if static.window is None else static.window - 1
    low, high = np.zeros_like(first), np.full_like(first, other_length - 1)
    if by_keys:
        low = np.maximum(first, 0) if static.causal else low
        high = high if static.window is None else np.minimum(last + back, high)
    else:
        low = low if static.window is None else np.maximum(first - back, 0)
        high = np.minimum(last, high) if static.causal else high
    low, high = low // other, high // other
    count = np.maximum(high - low + 1, 0)
    steps = np.arange(max(1, count.max()))
    if by_keys:
        idle = steps[-1] + 1 - count
        met = steps >= idle[:, None]
        block = np.where(met, low[:, None] + steps - idle[:, None], low[:, None])
    else:
        met = steps < count[:, None]
        block = np.where(met, low[:, None] + steps, np.roll(low, -1)[:, None])
    return np.clip(block, 0, other_length // other - 1), met


def _mask_info(plan: Plan, by_keys: bool) -> tuple[Any, Callable | None]:
    """Splash attention's description of a mask, in numpy, and the function that masks within a block."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

    static = plan.static
    block, met = _meetings(plan, by_keys)
    if by_keys:
        block, met = block.T, met.T
    block = block.astype(np.int8 if block.max() < 128 else np.int16 if block.max() < 2**15 else np.int32)
    masked = static.causal or static.window is not None

    def sees(query, key):
        query = query + static.offset
        inside = None if static.window is None else key > query - static.window
        if not static.causal:
            return inside
        return key <= query if inside is None else inside & (key <= query)

    info = splash_attention_mask_info.MaskInfo(
        data_next=block[None],
        mask_next=None,
        block_mask=met[None].astype(np.int8),
        partial_mask_blocks=None,
        q_sequence=np.arange(plan.time, dtype=np.int32) if masked else None,
    )
    return info, sees if masked else None


class _Splash:
    """Splash attention's three kernels, for a plan."""

    def __init__(self, plan: Plan):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

        self.plan, self.module = plan, splash_attention_kernel

    def _call(self, function, arrays, by_keys: bool = False):
        """function(mask info, mask function, *arrays) for each row and each key and value head.

        The kernels do not declare over which mesh axes their results vary, and are traced as if there were none.
        """
        from jax._src.config import _check_vma

        info, mask_function = _mask_info(self.plan, by_keys)
        axes = tuple(sorted(varying_axes(arrays)))
        *arrays, query_segment, key_segment = arrays
        precision = "highest" if arrays[0].dtype == jnp.float32 else "default"
        with _check_vma(False), jax.default_matmul_precision(precision):
            info = jax.tree.map(jnp.asarray, info)

            def of_head(query_segment, key_segment, *arrays):
                segments = None
                if query_segment is not None:
                    segments = self.module.SegmentIds(q=query_segment, kv=key_segment)
                return function(info, mask_function, segments, *arrays)

            of_row = jax.vmap(of_head, in_axes=(None, None, *[0] * len(arrays)))
            results = jax.vmap(of_row)(query_segment, key_segment, *arrays)
        missing = [tuple(sorted(set(axes) - varying_axes(result))) for result in results]
        pairs = zip(results, missing, strict=True)
        return tuple(jax.lax.pcast(x, absent, to="varying") if absent else x for x, absent in pairs)

    @property
    def _common(self) -> dict[str, Any]:
        return {
            "mask_value": MASK_VALUE,
            "is_mqa": True,
            "attn_logits_soft_cap": self.plan.static.softcap,
            "interpret": self.plan.interpret,
        }

    def forward(self, q, k, v, query_segment, key_segment):
        """(out, log_sum_exp float32)."""
        plan = self.plan
        sizes = self.module.BlockSizes(block_q=plan.block_q, block_kv=plan.block_kv)

        def call(info, mask_function, segments, q, k, v):
            out, (log_sum_exp,) = self.module._splash_attention_forward(
                info,
                q,
                k,
                v,
                segments,
                sinks=None,
                block_sizes=sizes,
                residual_checkpoint_name=None,
                save_residuals=True,
                mask_function=mask_function,
                **self._common,
            )
            return out, log_sum_exp

        return self._call(call, (q, k, v, query_segment, key_segment))

    def backward(self, q, k, v, query_segment, key_segment, log_sum_exp, d_out, delta):
        """(dq, dk, dv)."""
        plan = self.plan
        layout = self.module.QKVLayout.HEAD_DIM_MINOR
        common = self._common | {f"{name}_layout": layout for name in "qkv"}
        common |= {"bq": plan.block_q, "bkv": plan.block_kv}

        def queries(info, mask_function, segments, q, k, v, *rest):
            dq = self.module._splash_attention_bwd_dq(
                q, k, v, segments, None, *rest, mask_info=info, mask_function=mask_function, **common
            )
            return (dq,)

        def keys(info, mask_function, segments, q, k, v, *rest):
            _, dk, dv = self.module._splash_attention_bwd_dkv(
                q,
                k,
                v,
                segments,
                None,
                *rest,
                mask_info=info,
                mask_function=mask_function,
                bkv_compute=plan.block_kv,
                use_fused_bwd_kernel=False,
                **common,
            )
            return dk, dv

        arrays = (q, k, v, log_sum_exp, d_out, delta, query_segment, key_segment)
        (dq,) = self._call(queries, arrays)
        return dq, *self._call(keys, arrays, by_keys=True)
