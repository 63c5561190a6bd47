"""Dense masked softmax attention under plain automatic differentiation: the definition, for tests and small inputs."""

import jax
import jax.numpy as jnp

from lcx_kernels.attention.arguments import Arguments, Static
from lcx_kernels.attention.visibility import NO_KEY_LOG_SUM_EXP, sides, visible


def attention(arguments: Arguments, static: Static) -> tuple[jax.Array, jax.Array]:
    """Return (out [batch, time, heads, V], log_sum_exp [batch, time, heads]), both in the dtype of the accumulators.

    There are no blocks here: ``chunk_size`` does not matter.
    """
    scores, mask = _scores(arguments, static), _mask(arguments, static)
    # Both selections are needed: the inner one keeps hidden scores out of the maximum and of every gradient.
    scores = jnp.where(mask, scores, NO_KEY_LOG_SUM_EXP)
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - maximum), 0)
    total = weights.sum(axis=-1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1, total)
    log_sum_exp = jnp.where(blind, NO_KEY_LOG_SUM_EXP, maximum + jnp.log(total))
    # The division comes last: before the sum, its derivative would multiply hidden values, however large, by 0.
    out = jnp.einsum("bngts,bsnv->bngtv", weights, arguments.v.astype(scores.dtype)) / total
    return _join_heads(out), _join_heads(log_sum_exp)[..., 0]


def gradients(arguments: Arguments, static: Static, log_sum_exp, d_out, delta) -> tuple[jax.Array, ...]:
    """(dq, dk, dv) of `api.attention_gradients`, by the derivative of the softmax written out, of scores automatic."""
    q, k, v = arguments[:3]
    mask = _mask(arguments, static)
    scores, pull = jax.vjp(lambda q, k: _scores(arguments._replace(q=q, k=k), static), q, k)
    dtype, split = scores.dtype, lambda x: _split_heads(x, k.shape[2]).astype(scores.dtype)  # [batch, n, g, time, ...]
    d_out, delta, log_sum_exp = split(d_out), split(delta[..., None]), split(log_sum_exp[..., None])
    weights = jnp.where(mask, jnp.exp(scores - log_sum_exp), 0)
    d_weights = jnp.einsum("bngtv,bsnv->bngts", d_out, v.astype(dtype))
    dq, dk = pull(jnp.where(mask, weights * (d_weights - delta), 0))
    return dq, dk, jnp.einsum("bngts,bngtv->bsnv", weights, d_out).astype(v.dtype)


def _scores(arguments: Arguments, static: Static) -> jax.Array:
    """[batch, kv_heads n, heads of each g, time, keys]."""
    dtype = jnp.promote_types(arguments.q.dtype, jnp.float32)
    q = _split_heads(arguments.q.astype(dtype) * static.scale, arguments.k.shape[2])
    scores = jnp.einsum("bngtk,bsnk->bngts", q, arguments.k.astype(dtype))
    return scores if static.softcap is None else static.softcap * jnp.tanh(scores / static.softcap)


def _mask(arguments: Arguments, static: Static) -> jax.Array:
    queries, keys = sides(arguments, static)
    expand_queries, expand_keys = (lambda x: x[:, None, None, :, None]), (lambda x: x[:, None, None, None, :])
    return visible(jax.tree.map(expand_queries, queries), jax.tree.map(expand_keys, keys))


def _split_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, time, heads, width] to [batch, n, g, time, width]."""
    batch, time, heads, width = x.shape
    return jnp.moveaxis(x.reshape(batch, time, kv_heads, heads // kv_heads, width), 1, 3)


def _join_heads(x: jax.Array) -> jax.Array:
    """The inverse of `_split_heads`."""
    batch, n, g, time, width = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(batch, time, n * g, width)
