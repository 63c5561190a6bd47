"""Matrix products over one or several axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.params import Initializer, param


class Dense(nnx.Module):
    """y = x W without bias: contracts x's last axes with the weight's first ones.

    The weight has shape inputs + outputs, so that heads and other groups are axes of their own and can be sharded.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Initializer,
        rngs: nnx.Rngs,
        *,
        dtype: Any = jnp.float32,
    ):
        self.contracted = len(inputs)
        self.weight = param(rngs, inputs + outputs, axes, init, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, time, *inputs]; returns [batch, time, *outputs] in x's dtype."""
        weight = self.weight[...].astype(x.dtype)
        inputs, outputs = weight.shape[: self.contracted], weight.shape[self.contracted :]
        batch = x.shape[: x.ndim - self.contracted]
        # As a matrix product of two axes: XLA on CPU is slow with more.
        y = x.reshape(*batch, math.prod(inputs)) @ weight.reshape(math.prod(inputs), math.prod(outputs))
        return y.reshape(*batch, *outputs)
