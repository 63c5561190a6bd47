"""The selective scan token by token, differentiated by JAX: the definition that the other backends are held to."""

import jax
import jax.numpy as jnp


def scan(x, dt, A, B, C, initial_state, reset, chunk_size) -> tuple[jax.Array | None, jax.Array]:
    """x, dt [batch, time, channels]; A [channels, state]; B, C [batch, time, state]; all of one dtype.

    Returns y [batch, time, channels] = h C (None if C is None) and the final state [batch, channels, state].
    """
    del chunk_size  # every state is kept
    if reset is None:
        reset = jnp.zeros_like(x[:, :, 0], dtype=bool)

    def step(h, token):
        x, dt, B, C, reset = token
        h = jnp.where(reset[:, None, None], jnp.zeros_like(h), h)
        h = jnp.exp(dt[:, :, None] * A) * h + (dt * x)[:, :, None] * B[:, None, :]
        return h, None if C is None else (h * C[:, None, :]).sum(axis=-1)

    tokens = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (x, dt, B, C, reset))
    final_state, y = jax.lax.scan(step, initial_state, tokens)
    return None if C is None else jnp.swapaxes(y, 0, 1), final_state
