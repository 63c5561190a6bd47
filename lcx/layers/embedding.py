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


def score(hidden: jax.Array, table: jax.Array) -> jax.Array:
    """hidden [..., d_model] times each row of a table [vocab_size, d_model]: [..., vocab_size], at least float32."""
    return contract(hidden, table.T, dtype=jnp.promote_types(hidden.dtype, jnp.float32))
