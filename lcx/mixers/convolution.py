"""The short convolution that stands before a recurrence."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.initializers import Uniform
from lcx.mixers.base import Context, ModelDims
from lcx.parallel.sequence import before, last
from lcx.params import param
from lcx_kernels.causal_conv import causal_conv

TOKEN = ("batch", "time")


class ShortConvolution(nnx.Module):
    """silu(conv(x)): every channel with its own filter over the current and the width - 1 preceding tokens.

    Channels may be several axes, [heads, width of a head]. What later tokens need is the tail, the last width - 1
    inputs. A tap that would look past a document's start is left out.
    """

    def __init__(
        self, channels: tuple[int, ...], axes: tuple[str | None, ...], width: int, dims: ModelDims, rngs: nnx.Rngs
    ):
        bound = Uniform(1 / math.sqrt(width))  # PyTorch's default for a depthwise convolution
        self.channels, self.axes, self.width, self.dims = channels, axes, width, dims
        self.weight = param(rngs, (*channels, width), (*axes, None), bound, dtype=dims.param_dtype)
        self.bias = param(rngs, channels, axes, bound, dtype=dims.param_dtype, decay=False)

    def __call__(self, x: jax.Array, tail: jax.Array | None, context: Context) -> tuple[jax.Array, jax.Array]:
        """x: [batch, time, *channels]; tail: [batch, width - 1, *channels] or None; returns both likewise."""

        def local(x, tail, weight, bias, lookback):
            tail = before(x, tail, self.width - 1)
            flat = lambda array: None if array is None else array.reshape(*array.shape[:2], -1)  # noqa: E731
            y, new_tail = causal_conv(
                flat(x), weight.reshape(-1, self.width), bias.reshape(-1), tail=flat(tail), lookback=lookback, silu=True
            )
            return y.reshape(x.shape), last(new_tail.reshape(x.shape[0], self.width - 1, *x.shape[2:]))

        tokens, tail_axes = ("batch", "time", *self.axes), ("batch", None, *self.axes)
        weight, bias = self.weight[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        y, tail = context.shard.kernel(
            local,
            dict(x=x, tail=tail, weight=weight, bias=bias, lookback=context.lookback),
            dict(x=tokens, tail=tail_axes, weight=(*self.axes, None), bias=self.axes, lookback=TOKEN),
            ((x.shape, tokens), (self._tail_shape(x.shape[0]), tail_axes)),
        )
        return y, tail

    def init_tail(self, batch_size: int) -> jax.Array:
        """The tail where nothing came before: zeros in the compute dtype."""
        return jnp.zeros(self._tail_shape(batch_size), self.dims.compute_dtype)

    def _tail_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size, self.width - 1, *self.channels)

    def flops(self, tokens: int = 1) -> int:
        """Forward FLOPs of that many tokens: a multiply-add for each tap."""
        return 2 * self.width * math.prod(self.channels) * tokens
