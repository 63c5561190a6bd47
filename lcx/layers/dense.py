"""Matrix products over one or several axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.parallel.sharding import ambient_mesh, flatten_tokens
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
        learning_rate: float = 1.0,
    ):
        self.contracted = len(inputs)
        self.weight = param(rngs, inputs + outputs, axes, init, dtype=dtype, learning_rate=learning_rate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, time, *inputs]; returns [batch, time, *outputs] in x's dtype."""
        return contract(x, self.weight[...], self.contracted)

    def apart(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """What `__call__` gives, [batch, time, *outputs[1:]] for each index of the first output axis.

        Each comes of a product of its own: kernels take arrays that lie in memory by themselves, and parts of one would
        have to be copied.
        """
        parts = jnp.moveaxis(self.weight[...], self.contracted, 0)
        return tuple(contract(x, part, self.contracted) for part in parts)

    def flops(self, tokens: int = 1) -> int:
        """Forward FLOPs of that many tokens: a multiply-add, two FLOPs, for each weight and token."""
        return 2 * math.prod(self.weight.shape) * tokens


def contract(x: jax.Array, weight: jax.Array, count: int = 1, dtype: Any = None) -> jax.Array:
    """Contracts x's last `count` axes with the weight's first ones, in x's dtype.

    On one device this is a product of two matrices: XLA's code for the gradient of a weight is several times slower
    with more axes, and copies what it contracts. On a mesh the features' axes stay apart, since each is sharded by
    itself; a device's tokens are one axis there too.

    Args:
      x: [batch, time, *inputs].
      weight: [*inputs, *outputs], cast to x's dtype.
      count: how many axes the inputs have.
      dtype: of the result and the sums; None is x's.

    Returns: [batch, time, *outputs].
    """
    weight = weight.astype(x.dtype)
    tokens, apart = flatten_tokens(x, x.ndim - count)
    if ambient_mesh():
        return apart(jnp.tensordot(tokens, weight, count, preferred_element_type=dtype))
    inputs, outputs = math.prod(weight.shape[:count]), weight.shape[count:]
    y = jnp.matmul(tokens.reshape(-1, inputs), weight.reshape(inputs, -1), preferred_element_type=dtype)
    return apart(y.reshape(-1, *outputs))
