"""Mixers that are looked at: the trained ones, that also tell what they attend to or select.

`observed(model)` has the same parameters and gives the same outputs; its attention and Mamba layers have more metrics,
which `streaming.stream` hands on with every chunk.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.base import Aux, Context, State
from lcx.mixers.mamba import Mamba
from lcx.mixers.mamba2 import Mamba2
from lcx.models import LanguageModel


class ObservedAttention(Attention):
    """Attention with the metrics `entropy` [batch, time, heads], in nats, and `distance` int32 [batch, time, heads].

    The distance is how far back each query's largest weight lies. A sink logit's weight counts in neither.
    """

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        state = self.init_state(*x.shape[:2]) if state is None else state
        out, after, _ = super().__call__(x, state, context)
        weights, distances = self._weights(x, state, after, context)
        entropy = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(jnp.maximum(weights, 1e-30)), 0), axis=-1)
        places = jnp.argmax(weights, axis=-1)
        farthest = jnp.take_along_axis(distances[:, :, None], places[..., None], axis=-1)[..., 0]
        return out, after, {"metrics": {"entropy": entropy, "distance": farthest.astype(jnp.int32)}}

    def _weights(self, x: jax.Array, before: State, after: State, context: Context) -> tuple[jax.Array, jax.Array]:
        """(weights [batch, time, heads, keys], how far before its query each key stands, [batch, time, keys])."""
        window, time = self.options.window, x.shape[1]
        query, key, _ = self.project(x)
        query, key = self.rotated(query, context.positions), self.rotated(key, context.positions)
        if window is None:  # the state after the chunk holds its keys too, in the order of the row
            keys = after["key"]
            distances = context.row_index[:, :, None] - jnp.arange(keys.shape[1])
        else:
            keys = jnp.concatenate([before["key"].astype(key.dtype), key], axis=1)
            distances = window - 1 + jnp.arange(time)[:, None] - jnp.arange(keys.shape[1])
            distances = jnp.broadcast_to(distances, (x.shape[0], *distances.shape))
        seen = (distances >= 0) & (distances <= context.lookback[:, :, None])
        seen &= distances < (window or distances.shape[-1] + 1)
        batch, _, heads, width = query.shape
        grouped = query.reshape(batch, time, keys.shape[2], -1, width)
        scores = jnp.einsum("bqhgk,bshk->bqhgs", grouped, keys.astype(query.dtype)) * width**-0.5
        scores = scores.reshape(batch, time, heads, -1).astype(jnp.float32)
        scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
        total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        sinks = self._sinks()
        total = total if sinks is None else jnp.logaddexp(total, sinks[:, None])
        return jnp.exp(scores - total), distances


class ObservedMamba(Mamba):
    """Mamba with the metrics of `selection`, by inner channel."""

    def metrics(self, dt: jax.Array, ssm: jax.Array) -> dict[str, jax.Array]:
        return super().metrics(dt, ssm) | selection(dt, self.dt_bias[...])


class ObservedMamba2(Mamba2):
    """Mamba-2 with the metrics of `selection`, by head."""

    def metrics(self, dt: jax.Array, ssm: jax.Array) -> dict[str, jax.Array]:
        return super().metrics(dt, ssm) | selection(dt, self.dt_bias[...])


def selection(dt: jax.Array, bias: jax.Array) -> dict[str, jax.Array]:
    """`dt_sum` and `dt_log_sum`, [batch, channels]: sums over a chunk of dt and of dt ln dt, dt after its softplus."""
    dt = jax.nn.softplus(dt.astype(jnp.float32) + bias.astype(jnp.float32))
    logarithms = jnp.log(jnp.maximum(dt, 1e-30))
    return {"dt_sum": jnp.sum(dt, axis=1), "dt_log_sum": jnp.sum(dt * logarithms, axis=1)}


OBSERVED = {Attention: ObservedAttention, Mamba: ObservedMamba, Mamba2: ObservedMamba2}


def observed(model: LanguageModel) -> LanguageModel:
    """The model with mixers that are looked at, those of the types that OBSERVED has.

    Raises UserError for attention with sink tokens, whose weights come in two parts.
    """
    model = nnx.clone(model)
    for key, layer in model.stack.layers.items():
        for name, mixer in layer.mixers.items():
            if isinstance(mixer, Attention) and mixer.options.sink_tokens:
                raise UserError(f"attention with sink_tokens ({name} of {key}) cannot be looked at yet.")
            if type(mixer) in OBSERVED:
                mixer.__class__ = OBSERVED[type(mixer)]
    return model
