"""A mixer of one's own, in a repository of one's own: an exponential moving average of the tokens.

    python scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/average \
        --config.model.pattern="average mlp" \
        --config.model.mixers.average.type=examples.moving_average:MovingAverage

Three things make it a mixer of lcx: an Options dataclass, a call that takes a state and returns the next one, and an
empty state; `flops` is for reports. The laws in tests/laws run on its `examples` like on every mixer of the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.layers.initializers import Uniform
from lcx.mixers import Context, Mixer, ModelDims
from lcx.params import param
from lcx.schema import limited


@dataclass(frozen=True)
class MovingAverageOptions:
    """Options of the mixer; `--config.model.mixers.NAME.spread=2` sets one."""

    spread: float = limited(1.0, above=0)  # how far the channels' rates of forgetting lie apart at the start


class MovingAverage(Mixer):
    """average[t] = keep * average[t-1] + (1 - keep) * x[t], one learned `keep` a channel; y = average W."""

    Options = MovingAverageOptions
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}

    def __init__(self, options: MovingAverageOptions, dims: ModelDims, rngs: nnx.Rngs):
        self.dims = dims
        rates = Uniform(options.spread)
        self.keep_logit = param(rngs, (dims.d_model,), (None,), rates, dtype=dims.param_dtype, decay=False)
        self.out = dims.output(dims.d_model, (None, "d_model"), rngs)

    def __call__(self, x: jax.Array, state: dict | None, context: Context) -> tuple[jax.Array, dict, dict]:
        wide = self.dims.state_dtype
        keep = jax.nn.sigmoid(self.keep_logit[...].astype(wide))
        average = self.init_state(x.shape[0], 0)["average"] if state is None else state["average"]

        def step(average: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, reset = token
            average = keep * jnp.where(reset[:, None], 0, average) + (1 - keep) * x
            return average, average

        tokens = (jnp.moveaxis(x.astype(wide), 1, 0), context.reset.T)
        average, averages = jax.lax.scan(step, average, tokens)
        return self.out(jnp.moveaxis(averages, 0, 1).astype(x.dtype)), {"average": average}, {}

    def init_state(self, batch_size: int, max_length: int) -> dict[str, jax.Array]:
        del max_length
        return {"average": jnp.zeros((batch_size, self.dims.d_model), self.dims.state_dtype)}

    def flops(self, tokens: int) -> int:
        """Optional, for reports: the average's two products and a sum for each channel, and the matrix."""
        return (3 * self.dims.d_model + self.out.flops()) * tokens
