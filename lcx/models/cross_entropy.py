"""The loss of each token, computed from hidden states so that the logits of all tokens never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_losses(
    logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log of the softmax denominator of each token.

    Time is cut into chunks; each chunk's logits are made, reduced and dropped, and made again for the gradient.

    Args:
      logits: from hidden [batch, time, d_model] to [batch, time, vocab_size], at least float32.
      hidden: [batch, time, d_model].
      targets: int32 [batch, time].
      chunk_size: tokens of a row whose logits exist at once; a shorter last chunk is padded.

    Returns: (cross-entropy in nats [batch, time], log denominator [batch, time]), in the dtype of the logits.
    """
    batch, time = targets.shape
    size = min(chunk_size, time)
    count = -(-time // size)

    def chunked(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), (0, count * size - time)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, size, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_losses(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden, targets = chunk
        scores = logits(hidden)
        log_denominator = jax.nn.logsumexp(scores, axis=-1)
        target_score = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return None, (log_denominator - target_score, log_denominator)

    _, losses = jax.lax.scan(chunk_losses, None, (chunked(hidden), chunked(targets)))
    return tuple(jnp.moveaxis(array, 0, 1).reshape(batch, count * size)[:, :time] for array in losses)
