"""Parameters that say what they are where they are made.

Every parameter of every layer comes from `param`. It carries its logical axes, whether weight decay applies and its
learning rate; sharding and the optimizer's groups read these declarations, and nothing matches parameter names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Declaration:
    """What a parameter says of itself."""

    axes: tuple[str | None, ...]  # logical axes; a stacked parameter has one more dimension, in front
    decay: bool = True  # does weight decay apply?
    learning_rate: float = 1.0  # multiplier of the configured peak, or the peak itself where absolute
    absolute: bool = False


class Initializer(Protocol):
    """Draws float32 values; hashable, so that equal draws share one compiled function."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array: ...


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    *,
    dtype: Any = jnp.float32,
    decay: bool = True,
    learning_rate: float = 1.0,
    absolute: bool = False,
) -> nnx.Param:
    """A new parameter. Values are drawn in float32 under jit, then cast, so that they do not depend on the dtype.

    Args:
      shape, axes: sizes and logical axis names (None: never sharded), one name a dimension.
      init: draws the values.
      decay, learning_rate, absolute: see `Declaration`.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} axes, got {axes}")
    value = _draw(rngs.params(), init=init, shape=tuple(shape), dtype=jnp.dtype(dtype))
    return nnx.Param(value, axes=tuple(axes), decay=decay, learning_rate=learning_rate, absolute=absolute)


@partial(jax.jit, static_argnames=("init", "shape", "dtype"))
def _draw(key: jax.Array, *, init: Initializer, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return init(key, shape).astype(dtype)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """A module as (structure, parameters); the parameters are nested dicts of arrays. `nnx.merge` is the inverse."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def create(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """`split(make())`, with all values drawn in one compiled program."""
    graphdef, _ = split(nnx.eval_shape(make))
    return graphdef, jax.jit(lambda: split(make())[1])()


def count_parameters(params: dict) -> int:
    """The number of parameters, summed over the leaves: arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def declarations(module: nnx.Module) -> dict:
    """The `Declaration` of each parameter, in the structure that `split` gives."""
    state = nnx.state(module, nnx.Param)

    def declare(variable: nnx.Param) -> Declaration:
        fields = ("axes", "decay", "learning_rate", "absolute")
        metadata = variable.get_metadata()
        return Declaration(**{field: metadata[field] for field in fields})

    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(lambda leaf: nnx.Param(declare(leaf)), state, is_leaf=is_param))


def path_name(path: tuple) -> str:
    """A key path of a parameter tree as one readable name: "stack/layers/0_mamba/mixers/mamba/A_log"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
