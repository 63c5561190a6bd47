"""Held-out loss: every token of a set of rows scored once."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lcx.models import LanguageModel
from lcx.models.cross_entropy import token_losses

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Perplexity:
    """The loss over a set of tokens."""

    nats: float  # sum of the tokens' cross-entropies
    tokens: int  # how many were scored

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_token(self) -> float:
        """Bits per token; bits per byte where tokens are bytes."""
        return self.loss / math.log(2)


def make_score(model: Callable[[dict], LanguageModel], chunk_size: int) -> Callable[[dict, Batch], tuple]:
    """The function (params, batch) -> (summed loss in nats, tokens scored), to be jitted.

    Args:
      model: from parameters to a model.
      chunk_size: tokens of a row whose logits exist at once.
    """

    def score(params: dict, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        bound = model(params)
        hidden, _, _ = bound.hidden(batch["tokens"], None, batch["positions"], batch["segment_ids"])
        losses, _ = token_losses(bound.output_table, hidden, batch["targets"], chunk_size)
        scored = batch["loss_weights"] > 0
        return jnp.sum(jnp.where(scored, losses, 0)), jnp.sum(scored, dtype=jnp.int32)

    return score


def perplexity(score: Callable[[Batch], tuple], batches: Iterable[Batch]) -> Perplexity:
    """Sums `score` over batches, in float64; one batch is in flight while the next is prepared."""
    nats, tokens, pending = 0.0, 0, None
    for batch in batches:
        result = score(batch)
        if pending is not None:
            nats, tokens = nats + float(pending[0]), tokens + int(pending[1])
        pending = result
    if pending is not None:
        nats, tokens = nats + float(pending[0]), tokens + int(pending[1])
    return Perplexity(nats, tokens)
