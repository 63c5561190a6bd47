"""The sequence state that rows carry from step to step: truncated back-propagation through time.

Row r of a step goes on where row r of the step before ended, from the state that it left behind; what it holds of
another document is forgotten where positions say so. The state is a part of the train state, and of its checkpoints.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lcx.config import Config
from lcx.errors import UserError
from lcx.models import LanguageModel
from lcx.parallel.sharding import Rules, activation_sharding, constrain

LONGEST = 2**30  # tokens a row is said to hold at most: more than any mixer looks back, and int32 with a chunk added


def abstract_carried(config: Config, model: LanguageModel, mesh: jax.sharding.Mesh, rules: Rules) -> dict:
    """What rows carry, as ShapeDtypeStructs with shardings: {} where they carry nothing, else the model's state, and
    `next`, the data index that it leads up to (int32 []).

    model: may be without values. Raises UserError for a mixer whose state grows.
    """
    if not config.train.carry_state:
        return {}
    state = jax.eval_shape(lambda: model.init_state(config.train.batch_size, LONGEST))
    for key, layer in model.stack.layers.items():
        for name, mixer in layer.mixers.items():
            if mixer.capacity(jax.tree.map(_one_period, state["layers"][key][name])) is not None:
                raise UserError(
                    f'train.carry_state: the state of the mixer "{name}" grows with every token; give it a window, or '
                    "train without carried states."
                )
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    by_row = activation_sharding(("batch",), mesh, rules)
    by_period = activation_sharding((None, "batch"), mesh, rules)
    return {
        "state": {
            "position": place(state["position"], by_row),
            "length": place(state["length"], by_row),
            "layers": jax.tree.map(lambda leaf: place(leaf, by_period), state["layers"]),
        },
        "next": place(jax.ShapeDtypeStruct((), jnp.int32), activation_sharding((), mesh, rules)),
    }


def _one_period(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def empty(abstract: Any) -> Any:
    """The state before the first token: zeros."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


def enter(carried: dict, data_index: jax.Array) -> dict | None:
    """The model state that the rows of this data index begin with; None where nothing is carried.

    Rows of an index that does not follow the last one begin with an empty state: what lies between was skipped.
    """
    if not carried:
        return None
    follows = carried["next"] == data_index
    return jax.tree.map(lambda leaf: jnp.where(follows, leaf, jnp.zeros_like(leaf)), carried["state"])


def leave(carried: dict, state: dict, data_index: jax.Array) -> dict:
    """What is carried on from the state after this data index's rows."""
    if not carried:
        return {}
    state = state | {"length": jnp.minimum(state["length"], LONGEST)}
    state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, carried["state"])
    return {"state": state, "next": data_index + 1}


def cut(state: dict | None, count: int) -> dict | None:
    """The rows' states in `count` pieces along a new first axis, as lcx.training.train_step cuts a batch."""
    if state is None:
        return None

    def cut_axis(leaf: jax.Array, axis: int) -> jax.Array:
        shape = (*leaf.shape[:axis], leaf.shape[axis] // count, count, *leaf.shape[axis + 1 :])
        pieces = jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)
        return constrain(pieces, (None,) * (axis + 1) + ("batch",) + (None,) * (leaf.ndim - axis - 1))

    return _by_batch_axis(cut_axis, state)


def join(pieces: dict) -> dict:
    """The inverse of `cut`."""

    def join_axis(leaf: jax.Array, axis: int) -> jax.Array:
        moved = jnp.moveaxis(leaf, 0, axis + 1)
        whole = moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
        return constrain(whole, (None,) * axis + ("batch",) + (None,) * (whole.ndim - axis - 1))

    return _by_batch_axis(join_axis, pieces)


def _by_batch_axis(function: Any, state: dict) -> dict:
    layers = jax.tree.map(lambda leaf: function(leaf, 1), state["layers"])
    return {name: function(state[name], 0) for name in ("position", "length")} | {"layers": layers}
