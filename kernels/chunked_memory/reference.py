"""The chunked memory token by token, differentiated by JAX: the definition that the other backends are held to."""

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.arguments import Arguments, Static, spread
from lcx_kernels.chunked_memory.state import PRECISION, SegmentState, ratio


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """Return out [batch, time, heads, V] in v's dtype, None without q, and the final state."""
    dtype, heads = arguments.dtype, arguments.heads
    q, k, v, log_decay, beta = (None if array is None else array.astype(dtype) for array in arguments[:5])
    k, v = spread(k, heads), spread(v, heads)
    q = None if q is None else spread(q, max(q.shape[2], heads))

    def step(state: SegmentState, token: tuple) -> tuple[SegmentState, jax.Array | None]:
        q, k, v, log_decay, beta, closes, reset = token
        if reset is not None:
            state = state.zeros().where(reset, state)
        state = _decayed(state, log_decay)
        state = _written(state, k, v, beta, static)
        out = None if q is None else _read(state if static.read == "exclusive" else state.total(), q)
        if closes is not None:
            state = state.closed().where(closes, state)
        return state, out

    tokens = (q, k, v, log_decay, beta, arguments.closes, arguments.reset)
    state, out = jax.lax.scan(step, arguments.state, jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), tokens))
    return None if q is None else jnp.swapaxes(out, 0, 1).astype(arguments.v.dtype), state


def _decayed(state: SegmentState, log_decay: jax.Array | None) -> SegmentState:
    """log_decay [batch, S] or [batch, S, K]."""
    if log_decay is None:
        return state
    decay = jnp.exp(log_decay if log_decay.ndim == 3 else log_decay[..., None])
    return jax.tree.map(lambda array: decay.reshape(*decay.shape, *[1] * (array.ndim - 3)) * array, state)


def _written(state: SegmentState, k, v, beta, static: Static) -> SegmentState:
    """The state after one token's write; k [batch, S, K], v [batch, S, V], beta [batch, S]."""
    if static.update == "delta_rule":
        v = beta[..., None] * (v - jnp.einsum("bnk,bnkv->bnv", k, state.memory, precision=PRECISION))
    elif static.update == "segment_delta":
        v = v - _read(state, k)
    memory = k[..., :, None] * v[..., None, :]
    add = lambda array, written: None if array is None else array + written  # noqa: E731
    if static.segmented:
        return state._replace(open_memory=add(state.open_memory, memory), open_normalizer=add(state.open_normalizer, k))
    return state._replace(memory=add(state.memory, memory), normalizer=add(state.normalizer, k))


def _read(state: SegmentState, q: jax.Array) -> jax.Array:
    """What queries [batch, heads, K] find, [batch, heads, V]."""
    grouped = q.reshape(q.shape[0], state.memory.shape[1], -1, q.shape[-1])
    found = jnp.einsum("bngk,bnkv->bngv", grouped, state.memory, precision=PRECISION)
    if state.normalizer is not None:
        found = ratio(found, jnp.einsum("bngk,bnk->bng", grouped, state.normalizer, precision=PRECISION))
    return found.reshape(*q.shape[:2], -1)
