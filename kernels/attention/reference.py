"""Dense masked softmax attention under plain automatic differentiation: the definition, for tests and small inputs."""

import jax
import jax.numpy as jnp

from lcx_kernels.attention.arguments import Arguments, Static
from lcx_kernels.attention.visibility import NO_KEY_LOG_SUM_EXP, sides, visible


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V], log_sum_exp [batch, time, heads]), both in the dtype of the accumulators.

    There are no blocks here: ``chunk_size`` does not matter.
    """
    q, k, v = arguments[:3]
    queries, keys = sides(arguments, static)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, time, heads, _ = q.shape
    kv_heads = k.shape[2]
    q = (q.astype(dtype) * static.scale).reshape(batch, time, kv_heads, heads // kv_heads, -1)
    scores = jnp.einsum("btngk,bsnk->bngts", q, k.astype(dtype))
    if static.softcap is not None:
        scores = static.softcap * jnp.tanh(scores / static.softcap)

    expand_queries, expand_keys = (lambda x: x[:, None, None, :, None]), (lambda x: x[:, None, None, None, :])
    mask = visible(jax.tree.map(expand_queries, queries), jax.tree.map(expand_keys, keys))
    # Both selections are needed: the inner one keeps hidden scores out of the maximum and of every gradient.
    scores = jnp.where(mask, scores, NO_KEY_LOG_SUM_EXP)
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - maximum), 0)
    total = weights.sum(axis=-1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1, total)
    log_sum_exp = jnp.where(blind, NO_KEY_LOG_SUM_EXP, maximum + jnp.log(total))
    # The division comes last: before the sum, its derivative would multiply hidden values, however large, by 0.
    out = jnp.einsum("bngts,bsnv->bngtv", weights, v.astype(dtype)) / total

    def join_heads(x):
        return jnp.moveaxis(x, 3, 1).reshape(batch, time, heads, -1)

    return join_heads(out), join_heads(log_sum_exp)[..., 0]
