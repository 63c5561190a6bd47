"""The segmented memory token by token, differentiated by JAX: the definition that the other backends are held to."""

import jax
import jax.numpy as jnp

from lcx_kernels.chunked_memory.state import SegmentState, ratio, read, written


def segment_memory(q, k, v, opens, reset, delta: bool, segment_length: int, state: SegmentState):
    """q [batch, time, n, g, K]; k [batch, time, n, K]; v [batch, time, n, V]; opens, reset bool [batch, time].

    `opens` marks the first token of a segment, `reset` of a document. Returns (out [batch, time, n, g, V], state).
    """
    del segment_length  # `opens` says it

    def step(state: SegmentState, token: tuple) -> tuple[SegmentState, jax.Array]:
        q, k, v, opens, reset = (array[:, None] for array in token)
        state = jax.tree.map(jnp.zeros_like, state).where(reset[:, 0], state)
        state = state.closed().where(opens[:, 0], state)
        out = ratio(*read(state.memory, state.normalizer, q))
        if delta:
            v = v - ratio(*read(state.memory, state.normalizer, k[:, :, :, None]))[:, :, :, 0]
        memory, normalizer = written(k, v)
        open_sums = (state.open_memory + memory, state.open_normalizer + normalizer)
        return SegmentState(state.memory, state.normalizer, *open_sums), out[:, 0]

    tokens = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (q, k, v, opens, reset))
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.swapaxes(out, 0, 1), state
