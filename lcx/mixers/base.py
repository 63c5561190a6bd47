"""What a mixer is: a lawful sequence function.

    y, state, aux = mixer(x, state, context)

x and y are [batch, time, d_model]. Training is the whole sequence from an empty state; prefill is a long chunk, decode
a chunk of one token; there is no other code path. The laws (`lcx.laws`) say what every mixer must obey.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.errors import UserError
from lcx.layers.dense import Dense
from lcx.layers.initializers import SCHEMES, times
from lcx.parallel.kernels import Shard
from lcx_kernels.backends import BackendUnavailable

State = dict[str, jax.Array]
# {"metrics": scalars, or vectors to be shown as histograms; "losses": scalars}; either may be absent
Aux = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every mixer is told of a chunk's tokens.

    A token sees back `lookback` tokens, whatever the mixer: masks, convolution taps and resets use only that.
    Segment numbers restart in each row and mean nothing across chunks.
    """

    positions: jax.Array  # int32 [batch, time]: the index of each token in its document
    segment_ids: jax.Array  # int32 [batch, time]: documents of the row from 1; 0 is padding
    length: jax.Array  # int32 [batch]: tokens that the incoming state holds
    shard: Shard = field(default=Shard(), metadata={"static": True})

    @property
    def row_index(self) -> jax.Array:
        """int32 [batch, time]: how many tokens of the row precede each token, those in the state included."""
        return self.length[:, None] + jnp.arange(self.positions.shape[1], dtype=jnp.int32)

    @property
    def lookback(self) -> jax.Array:
        """int32 [batch, time]: how many tokens before itself a token may see: min(position, tokens there are)."""
        return jnp.minimum(self.positions, self.row_index)

    @property
    def reset(self) -> jax.Array:
        """bool [batch, time]: the token starts its document, so recurrent states are empty before it."""
        return self.lookback == 0


@dataclass(frozen=True)
class ModelDims:
    """What a mixer is told of the model around it."""

    d_model: int
    sublayers: int  # residual branches of the whole model, which scale what writes into the stream
    norm_eps: float = 1e-5
    init: str = "fan_in"  # a name of lcx.layers.initializers.SCHEMES
    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    mup_base_width: int | None = None  # None: the standard parametrisation

    @property
    def width_ratio(self) -> float:
        """The width over the one at which learning rates were found; 1 in the standard parametrisation."""
        return self.d_model / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def standard(self) -> "ModelDims":
        """The same in the standard parametrisation, for mixers to which the rules of muP do not apply."""
        return replace(self, mup_base_width=None)

    @property
    def state_dtype(self) -> Any:
        """The dtype of recurrent states: at least float32."""
        return jnp.promote_types(self.compute_dtype, jnp.float32)

    def dense(
        self,
        inputs: int | tuple,
        outputs: int | tuple,
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        multiplier: float = 1.0,
    ) -> Dense:
        """A matrix inside a mixer, started by the model's scheme.

        multiplier: of the output, which the matrix starts with and learns in proportion to.
        """
        return self._matrix("dense", inputs, outputs, axes, rngs, multiplier)

    def output(self, inputs: int | tuple, axes: tuple[str | None, ...], rngs: nnx.Rngs) -> Dense:
        """A matrix that writes into the residual stream, started by the model's scheme."""
        return self._matrix("output", inputs, self.d_model, axes, rngs)

    def _matrix(
        self,
        role: str,
        inputs: int | tuple,
        outputs: int | tuple,
        axes: tuple,
        rngs: nnx.Rngs,
        multiplier: float = 1.0,
    ) -> Dense:
        """A hidden matrix: both of its sides grow with the model.

        Under muP (Yang et al. 2022, arXiv 2203.03466, table 8) it starts with a variance that falls as the width grows,
        whatever the scheme says of the base, and Adam's learning rate falls likewise.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        fan_in = 1
        for size in inputs:
            fan_in *= size
        ratio = self.width_ratio
        init = getattr(SCHEMES[self.init], role)(fan_in / ratio, self.d_model / ratio, self.sublayers)
        init = times(init, multiplier / math.sqrt(ratio))
        return Dense(inputs, outputs, axes, init, rngs, dtype=self.param_dtype, learning_rate=multiplier / ratio)


def check_backend(select: Callable[[str], str], backend: str) -> None:
    """Raises UserError where a kernel's `select_backend` refuses the backend of a mixer's options."""
    try:
        select(backend)
    except (ValueError, BackendUnavailable) as error:
        raise UserError(f"{error}.") from error


class Mixer(nnx.Module):
    """Base of all mixers. A new one is a file with an Options dataclass and a subclass with these methods."""

    Options: ClassVar[type]  # frozen dataclass of what a config may set
    # Small options that the laws are certified on, by a name for each variant; d_model is 32.
    examples: ClassVar[Mapping[str, Mapping[str, Any]]]
    # Arrays of the state that never hold a negative number, for whoever makes up a state (the laws do).
    positive_state: ClassVar[frozenset[str]] = frozenset()
    # Arrays of the state that sum up the past, [batch, ...], as against tokens that are kept: what may overflow.
    recurrent_state: ClassVar[frozenset[str]] = frozenset()
    # Laws that it breaks by nature, of "causality", "continuation", "isolation", "sharding" and "backend": a scaling of
    # positions by the total length breaks "continuation". The laws' tests check that it breaks these and no others.
    lawful_except: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any, dims: ModelDims, rngs: nnx.Rngs):
        """Makes the parameters. Raises UserError for options that do not fit `dims`."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        """One chunk.

        Args:
          x: [batch, time, d_model]; its dtype is the compute dtype.
          state: what the tokens before left behind; None is empty, with capacity for this chunk.
          context: positions, documents and the length of what the state holds.

        Returns: (y like x, the state after the last token, aux).
        """
        raise NotImplementedError

    def init_state(self, batch_size: int, max_length: int) -> State:
        """An empty state: a dict of float arrays, zeros, batch first. A stateless mixer has {}."""
        del batch_size, max_length
        return {}

    def capacity(self, state: State) -> int | None:
        """How many tokens the state can hold; None where its size does not depend on that."""
        del state
        return None

    def flops(self, tokens: int) -> int | None:
        """Model FLOPs of one forward pass over a document of that many tokens, from an empty state.

        A multiply-add is two. Matrix products, recurrences and the pairs of tokens that see each other count; what a
        program computes only to mask it, or computes again, does not, nor do norms, activations and exponentials.
        None: not known.
        """
        del tokens
        return None

    def vector_flops(self, tokens: int) -> int:
        """The part of `flops` that matrix units cannot do: recurrences and convolutions taken token by token."""
        del tokens
        return 0
