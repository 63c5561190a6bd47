"""The loss of each token, computed from hidden states so that the logits of all tokens never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcx.parallel.sharding import constrain, time_shards


@jax.named_scope("head")  # in compiled programs and profiles, with what it calls
def token_losses(
    logits: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log of the softmax denominator of each token.

    Time is cut into chunks; each chunk's logits are made, reduced and dropped, and made again for the gradient. Where
    time is cut over devices, a chunk has as many tokens of each device, so that all work on every chunk.

    Args:
      logits: from hidden [batch, time, d_model] to [batch, time, vocab_size], at least float32.
      hidden: [batch, time, d_model].
      targets: int32 [batch, time].
      chunk_size: tokens of a row whose logits exist at once; a shorter last chunk is padded.

    Returns: (cross-entropy in nats [batch, time], log denominator [batch, time]), in the dtype of the logits.
    """
    batch, time = targets.shape
    shards = time_shards(time)
    size = min(max(1, chunk_size // shards), time // shards)
    count = -(-(time // shards) // size)

    def chunked(array: jax.Array) -> jax.Array:
        by_shard = array.reshape(batch, shards, time // shards, *array.shape[2:])
        padded = jnp.pad(by_shard, [(0, 0), (0, 0), (0, count * size - time // shards)] + [(0, 0)] * (array.ndim - 2))
        chunks = jnp.moveaxis(padded.reshape(batch, shards, count, size, *array.shape[2:]), 2, 0)
        chunks = chunks.reshape(count, batch, shards * size, *array.shape[2:])
        return constrain(chunks, (None, "batch", "time", None)[: chunks.ndim])

    def joined(chunks: jax.Array) -> jax.Array:
        by_shard = jnp.moveaxis(chunks.reshape(count, batch, shards, size), 0, 2)
        return by_shard.reshape(batch, shards, count * size)[:, :, : time // shards].reshape(batch, time)

    @jax.checkpoint
    def chunk_losses(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden, targets = chunk
        scores = logits(hidden)
        log_denominator = jax.nn.logsumexp(scores, axis=-1)
        target_score = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return None, (log_denominator - target_score, log_denominator)

    _, losses = jax.lax.scan(chunk_losses, None, (chunked(hidden), chunked(targets)))
    return tuple(map(joined, losses))
