"""SwiGLU feed-forward network, a mixer that mixes no tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx

from lcx.mixers.base import Aux, Context, Mixer, ModelDims, State


@dataclass(frozen=True)
class MLPOptions:
    """Options of `type: "mlp"`."""

    d_ff: int  # inner width


class MLP(Mixer):
    """y = down(silu(gate(x)) * up(x)), no biases (Shazeer, arXiv 2002.05202, eq. 6)."""

    Options = MLPOptions
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {"swiglu": {"d_ff": 48}}

    def __init__(self, options: MLPOptions, dims: ModelDims, rngs: nnx.Rngs):
        self.gate = dims.dense(dims.d_model, options.d_ff, ("d_model", "d_ff"), rngs)
        self.up = dims.dense(dims.d_model, options.d_ff, ("d_model", "d_ff"), rngs)
        self.down = dims.output(options.d_ff, ("d_ff", "d_model"), rngs)

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        del state, context
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x)), {}, {}

    def flops(self, tokens: int) -> int:
        """The three matrices; the product with the gate belongs to the activation and is left out."""
        return self.gate.flops(tokens) + self.up.flops(tokens) + self.down.flops(tokens)
