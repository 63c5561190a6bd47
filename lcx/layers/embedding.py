"""Token embedding and output head."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.dense import contract
from lcx.params import Initializer, param


class Embedding(nnx.Module):
    """A table [vocab_size, d_model] that embeds tokens and, when tied, also scores them."""

    def __init__(self, vocab_size: int, d_model: int, init: Initializer, rngs: nnx.Rngs, *, dtype: Any = jnp.float32):
        self.table = param(rngs, (vocab_size, d_model), ("vocab", "d_model"), init, dtype=dtype)

    def __call__(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """tokens: int32 [batch, time]; returns [batch, time, d_model] in dtype."""
        return jnp.take(self.table[...], tokens, axis=0).astype(dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., d_model]; returns [..., vocab_size], accumulated and given in at least float32."""
        return score(hidden, self.table[...])

    def flops(self, tokens: int = 1) -> int:
        """Forward FLOPs of `logits` of that many tokens, a multiply-add being two; looking tokens up has none."""
        return 2 * math.prod(self.table.shape) * tokens


@jax.custom_vjp
def score(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """hidden [..., d_model] times each row of a table [vocab_size, d_model]: [..., vocab_size], at least float32.

    The gradient is rounded to hidden's dtype before it meets hidden and the table: these products are most of what the
    loss costs, and in float32 they would take several times as long on accelerators.
    """
    return contract(hidden, table.T, dtype=jnp.promote_types(hidden.dtype, jnp.float32))


def _score_forward(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return score(hidden, table), (hidden, table)


def _score_backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(lambda hidden, table: contract(hidden, table.T), *operands)
    return pull(gradient.astype(operands[0].dtype))


score.defvjp(_score_forward, _score_backward)
