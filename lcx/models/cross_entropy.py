"""The loss of each token, computed from hidden states so that the logits of all tokens never exist at once."""

import jax
import jax.numpy as jnp

from lcx.layers.embedding import score
from lcx.parallel.kernels import Shard
from lcx.parallel.sharding import time_shards
from lcx.parallel.vocabulary import log_sum_exp, pick, vocabulary_axis

TOKENS = ("batch", "time")


@jax.named_scope("head")  # in compiled programs and profiles, with what it calls
def token_losses(
    table: jax.Array, hidden: jax.Array, targets: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and log of the softmax denominator of each token.

    Time is cut into chunks; each chunk's logits are made, reduced and dropped, and made again for the gradient. Where
    time is cut over devices, a chunk has as many tokens of each device, so that all work on every chunk. Devices go
    through their chunks by themselves: the table is gathered once before them, and its gradient summed once after.

    Args:
      table: [vocab_size, d_model], what scores the tokens (`LanguageModel.output_table`).
      hidden: [batch, time, d_model].
      targets: int32 [batch, time].
      chunk_size: tokens of a row whose logits exist at once; a shorter last chunk is padded.

    Returns: (cross-entropy in nats [batch, time], log denominator [batch, time]), at least float32.
    """
    size, axis = max(1, chunk_size // time_shards(targets.shape[1])), vocabulary_axis(len(table))

    def local(hidden: jax.Array, targets: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        @jax.checkpoint
        def of_chunk(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            hidden, targets = chunk
            scores = score(hidden, table)
            log_denominator = log_sum_exp(scores, axis)
            return None, (log_denominator - pick(scores, targets, axis), log_denominator)

        time = targets.shape[1]
        _, losses = jax.lax.scan(of_chunk, None, (_chunks(hidden, size), _chunks(targets, size)))
        return tuple(jnp.moveaxis(part, 0, 1).reshape(targets.shape[0], -1)[:, :time] for part in losses)

    arrays = dict(hidden=hidden, targets=targets, table=table)
    axes = dict(hidden=(*TOKENS, None), targets=TOKENS, table=("vocab", None))
    return Shard().kernel(local, arrays, axes, ((targets.shape, TOKENS), (targets.shape, TOKENS)))


def _chunks(array: jax.Array, size: int) -> jax.Array:
    """[batch, time, ...] to [chunks, batch, size, ...], with zeros behind the last token."""
    batch, time = array.shape[:2]
    size = min(size, time)
    padded = jnp.pad(array, [(0, 0), (0, -time % size)] + [(0, 0)] * (array.ndim - 2))
    return jnp.moveaxis(padded.reshape(batch, -1, size, *array.shape[2:]), 1, 0)
