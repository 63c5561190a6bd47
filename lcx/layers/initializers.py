"""How parameters start: distributions as values, and the papers' schemes as a table.

A scheme says how three roles are drawn: `dense` (any matrix), `output` (a matrix that writes into the residual
stream) and `embedding`. `sublayers` is the number of residual branches of the whole model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -self.bound, self.bound)


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return self.std * jax.random.normal(key, shape, jnp.float32)


def times(init: Uniform | Normal, factor: float) -> Uniform | Normal:
    """Draws of `init`, multiplied."""
    if isinstance(init, Uniform):
        return Uniform(init.bound * factor)
    return Normal(init.std * factor)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        del key
        return jnp.full(shape, self.value, jnp.float32)


@dataclass(frozen=True)
class LogArange:
    """ln(1), ln(2), ... along the last axis: the S4D-real start of A_log (Mamba, arXiv 2312.00752, section 3.6)."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        del key
        return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


@dataclass(frozen=True)
class LogOfUniform:
    """ln of U(low, high): A_log of Mamba-2 (arXiv 2405.21060; the range is that of the authors' code)."""

    low: float
    high: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, self.low, self.high))


@dataclass(frozen=True)
class InverseSoftplusLogUniform:
    """b with softplus(b) log-uniform in [low, high], at least floor: the bias of Mamba's dt (arXiv 2312.00752, 3.6)."""

    low: float
    high: float
    floor: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        draw = jax.random.uniform(key, shape, jnp.float32)
        dt = jnp.exp(draw * (math.log(self.high) - math.log(self.low)) + math.log(self.low))
        dt = jnp.maximum(dt, self.floor)
        return dt + jnp.log(-jnp.expm1(-dt))


@dataclass(frozen=True)
class Scheme:
    """One paper's way to start a model; each role maps (fan_in, d_model, sublayers) to an initializer."""

    dense: Callable[[float, float, int], Normal | Uniform]
    output: Callable[[float, float, int], Normal | Uniform]
    embedding: Callable[[float, float, int], Normal]


def _uniform(fan_in: float, scale: float = 1.0) -> Uniform:
    return Uniform(scale / math.sqrt(fan_in))


SCHEMES = {
    # Mamba and SAMBA: PyTorch's default bound, outputs divided by sqrt(residual branches), embedding 0.02.
    "fan_in": Scheme(
        dense=lambda fan_in, d_model, sublayers: _uniform(fan_in),
        output=lambda fan_in, d_model, sublayers: _uniform(fan_in, 1 / math.sqrt(sublayers)),
        embedding=lambda fan_in, d_model, sublayers: Normal(0.02),
    ),
    # The SAMBA code's LLaMA: N(0, 2 / (5 d)), outputs 1 / (sqrt(d) * blocks); a block is two residual branches.
    "small": Scheme(
        dense=lambda fan_in, d_model, sublayers: Normal(math.sqrt(2 / (5 * d_model))),
        output=lambda fan_in, d_model, sublayers: Normal(2 / (math.sqrt(d_model) * sublayers)),
        embedding=lambda fan_in, d_model, sublayers: Normal(math.sqrt(2 / (5 * d_model))),
    ),
    # Hugging Face's Llama: N(0, 0.02) for every matrix.
    "normal": Scheme(
        dense=lambda fan_in, d_model, sublayers: Normal(0.02),
        output=lambda fan_in, d_model, sublayers: Normal(0.02),
        embedding=lambda fan_in, d_model, sublayers: Normal(0.02),
    ),
}
