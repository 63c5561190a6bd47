"""Everything that a run is at one step, as one pytree."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lcx.config import Config
from lcx.models import LanguageModel
from lcx.parallel.sharding import Rules, parameter_shardings, rules_of
from lcx.params import declarations, split
from lcx.training import health
from lcx.training.carried_state import abstract_carried, empty


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds; a run is the fold of `train_step` over it."""

    params: dict  # nested dicts of arrays
    opt_state: Any
    step: jax.Array  # int32 []: steps done
    data_index: jax.Array  # int32 []: the next batch's index
    rng: jax.Array  # typed key []
    carried: dict = field(default_factory=dict)  # what rows carry on: see lcx.training.carried_state
    health: dict = field(default_factory=dict)  # what is usual, and what is stepped over: see lcx.training.health


@dataclass(frozen=True)
class Blueprint:
    """A model without values: its structure, the parameters' shapes and what they declare."""

    graphdef: nnx.GraphDef
    shapes: dict  # ShapeDtypeStructs, as `params`
    declarations: dict
    rules: Rules  # the mesh axes of the parameters' and activations' axes

    def model(self, params: dict) -> LanguageModel:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)


def blueprint(config: Config) -> Blueprint:
    """The abstract model of a config; costs no memory. Raises UserError for a model that cannot be built."""
    abstract = nnx.eval_shape(lambda: LanguageModel(config.model, nnx.Rngs(0)))
    graphdef, shapes = split(abstract)
    declared = declarations(abstract)
    axes = {axis for leaf in jax.tree.leaves(declared) for axis in leaf.axes if axis}
    return Blueprint(graphdef, shapes, declared, rules_of(config.mesh, axes))


def abstract_state(
    config: Config, plan: Blueprint, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state's shapes, dtypes and shardings on a mesh: what a checkpoint is restored onto.

    Optimizer statistics are sharded like their parameters, carried states like a batch; scalars are on every device.
    Raises UserError for states that cannot be carried.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = parameter_shardings(plan.shapes, plan.declarations, mesh, plan.rules)
    opt_shapes = jax.eval_shape(optimizer.init, plan.shapes)
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_shapes,
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return TrainState(
        params=jax.tree.map(place, plan.shapes, shardings),
        opt_state=jax.tree.map(place, opt_shapes, opt_shardings),
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        data_index=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        rng=place(jax.eval_shape(lambda: jax.random.key(0)), everywhere),
        carried=abstract_carried(config, plan.model(plan.shapes), mesh, plan.rules),
        health=jax.tree.map(
            lambda leaf: place(leaf, everywhere), jax.eval_shape(lambda: health.initial(config.health))
        ),
    )


def create_state(
    config: Config, optimizer: optax.GradientTransformation, abstract: TrainState, params: dict | None = None
) -> TrainState:
    """A new run's state, drawn from train.seed straight onto the devices that `abstract` names.

    params: what it begins with instead of drawn parameters; they are donated.
    """

    def create(params: dict | None) -> TrainState:
        if params is None:
            _, params = split(LanguageModel(config.model, nnx.Rngs(config.train.seed)))
        zero = jnp.zeros((), jnp.int32)
        rng = jax.random.key(config.train.seed)
        carried = empty(abstract.carried)
        return TrainState(params, optimizer.init(params), zero, zero, rng, carried, health.initial(config.health))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)
