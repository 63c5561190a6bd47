"""What the backends of the convolution share: how taps look back, and the tokens that are kept for what follows."""

import jax
import jax.numpy as jnp


def taps(width: int) -> list[tuple[int, int]]:
    """How far back each tap looks, and its column in the weights: the current token first."""
    return [(distance, width - 1 - distance) for distance in range(width)]


def select(distance: int, lookback: jax.Array | None, values: jax.Array) -> jax.Array:
    """Values of the tokens that may look so far back, 0 of the others: by selection, so that not even a NaN passes.

    lookback [batch, time] or None for no limit; values [batch, time, channels].
    """
    if lookback is None or distance == 0:
        return values
    return jnp.where((distance <= lookback)[:, :, None], values, jnp.zeros_like(values))


def last_tokens(x: jax.Array, tail: jax.Array) -> jax.Array:
    """The tail for the tokens after x: as many tokens as ``tail`` has, in its dtype, the last of both."""
    held, time = tail.shape[1], x.shape[1]
    if time >= held:
        return x[:, time - held :].astype(tail.dtype)
    return jnp.concatenate([tail[:, time:], x.astype(tail.dtype)], axis=1)


def add_last(dx: jax.Array, d_tail: jax.Array, d_last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and the tail with that of ``last_tokens`` added, in place: the rest of dx is not moved."""
    held, time = d_tail.shape[1], dx.shape[1]
    of_x = min(held, time)
    if of_x:
        end = dx[:, time - of_x :] + d_last[:, held - of_x :].astype(dx.dtype)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, end, time - of_x, axis=1)
    if of_x < held:
        d_tail = d_tail.at[:, of_x:].add(d_last[:, : held - of_x].astype(d_tail.dtype))
    return dx, d_tail
