"""From logical axes to mesh axes: one table for parameters, one for activations, and what a config changes in them."""

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lcx.config import MeshConfig
from lcx.errors import UserError, suggest
from lcx.params import Declaration, path_name

Table = Mapping[str, tuple[str, ...]]

# A name that is not in a table is not sharded.
PARAMETER_RULES: Table = {
    "d_model": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "groups": ("tensor",),
    "inner": ("tensor",),
    "d_ff": ("tensor",),
}
ACTIVATION_RULES: Table = {
    "batch": ("data", "fsdp"),
    "time": ("seq",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "groups": ("tensor",),
    "inner": ("tensor",),
    "d_ff": ("tensor",),
    "vocab": ("tensor",),
}
# Axes of parameters that every device has whole where they do not divide: few groups serve many heads.
WHOLE_IF_UNEVEN = frozenset({"groups"})


class Rules(NamedTuple):
    """The mesh axes of each logical axis."""

    parameters: Table = PARAMETER_RULES
    activations: Table = ACTIVATION_RULES


DEFAULT_RULES = Rules()
_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


def rules_of(config: MeshConfig, declared: Collection[str] = ()) -> Rules:
    """The tables with what a config changes in them.

    Args:
      config: its parameter_rules and activation_rules name the mesh axes of some logical axes.
      declared: logical axes of the model's parameters, which a user's mixer may have of its own.

    Raises UserError for a logical axis that does not exist, or activations that one mesh axis would cut twice.
    """
    tables = []
    for kind, table in (("parameter_rules", PARAMETER_RULES), ("activation_rules", ACTIVATION_RULES)):
        changed = {name: tuple(places.split()) for name, places in getattr(config, kind).items()}
        for name in changed:
            if name not in table and name not in declared:
                raise UserError(f'mesh.{kind}: no axis is called "{name}": {suggest(name, {*table, *declared})}')
        tables.append({**table, **changed})
    if "vocab" not in config.activation_rules:  # logits are cut where tokens leave something to cut
        taken = {*tables[1]["batch"], *tables[1]["time"]}
        tables[1]["vocab"] = tuple(axis for axis in tables[1]["vocab"] if axis not in taken)
    rules = Rules(*tables)
    _check_activations(rules.activations)
    return rules


def _check_activations(table: Table) -> None:
    """An array of [batch, time, anything] must not be cut twice by one mesh axis."""
    for name, places in table.items():
        for other in ("batch", "time"):
            twice = set(places) & set(table[other]) if name != other else set()
            if twice:
                raise UserError(
                    f"mesh.activation_rules: {min(twice)} cuts both {other} and {name}, which one array has; "
                    "give each mesh axis to one of them."
                )


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Makes a mesh, and the rules for it, the ones of programs that are traced inside, in this thread."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)


def spec(axes: tuple[str | None, ...], table: Table, mesh: jax.sharding.AbstractMesh) -> PartitionSpec:
    """The partition of an array with these logical axes. Mesh axes of one device are left out."""
    parts = []
    for axis in axes:
        used = tuple(name for name in table.get(axis, ()) if mesh.shape[name] > 1)
        parts.append(used[0] if len(used) == 1 else used or None)
    return PartitionSpec(*parts)


def shards(part: str | tuple[str, ...] | None, mesh: jax.sharding.AbstractMesh) -> int:
    """The number of pieces that one entry of a PartitionSpec cuts a dimension into."""
    count = 1
    for name in (part,) if isinstance(part, str) else part or ():
        count *= mesh.shape[name]
    return count


def batch_shards(mesh: jax.sharding.AbstractMesh, rules: Rules = DEFAULT_RULES) -> int:
    """How many pieces a batch is cut into on this mesh."""
    return shards(spec(("batch",), rules.activations, mesh)[0], mesh)


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that is in force where a program is traced; None where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def time_shards(time: int) -> int:
    """How many pieces the ambient mesh cuts a sequence of that many tokens into; 1 where it does not divide."""
    mesh = ambient_mesh()
    return 1 if mesh is None else shards(divisible_spec((time,), ("time",), mesh)[0], mesh)


def activation_sharding(
    axes: tuple[str | None, ...], mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """The sharding of an activation, or of a batch's array, with these logical axes."""
    return NamedSharding(mesh, spec(axes, rules.activations, mesh))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks that an activation be laid out by the rules on the ambient mesh; without one it is left alone.

    A dimension that does not divide stays whole: a prompt of one row on eight devices is computed on each.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(x.shape, axes, mesh))


def flatten_tokens(x: jax.Array, leading: int = 2) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """An activation's axes of tokens as one, and the function that takes an array apart into them again.

    Each device flattens its own part, so that nothing is sent, and the order of tokens is that of the devices: this is
    for what is done to each token by itself, or summed over all.

    Args:
      x: [batch, time, ...], or [batch, ...].
      leading: how many of its axes are of tokens.

    Returns: (x as [tokens, ...], a function from [tokens, ...] to [batch, time, ...]).
    """
    mesh, shape = ambient_mesh(), x.shape[:leading]
    merge = lambda array: array.reshape(-1, *array.shape[leading:])  # noqa: E731
    part = lambda sizes: lambda array: array.reshape(*sizes, *array.shape[1:])  # noqa: E731
    cut = () if mesh is None else divisible_spec(shape, ("batch", "time")[:leading], mesh)
    places = [name for axes in cut for name in ((axes,) if isinstance(axes, str) else axes or ())]
    if mesh is None or set(places) <= set(mesh.manual_axes):  # nothing is cut, or x is a device's part already
        return merge(x), part(shape)
    own = [size // shards(axes, mesh) for size, axes in zip(shape, cut, strict=True)]
    local = partial(jax.shard_map, mesh=mesh, axis_names=set(places))
    flat = PartitionSpec(tuple(places))
    return local(merge, in_specs=cut, out_specs=flat)(x), local(part(own), in_specs=flat, out_specs=cut)


def divisible_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: jax.sharding.AbstractMesh
) -> PartitionSpec:
    """The partition by the activation rules, without the dimensions that do not divide."""
    wanted = spec(axes, _rules.get().activations, mesh)
    return PartitionSpec(
        *(part if size % shards(part, mesh) == 0 else None for size, part in zip(shape, wanted, strict=True))
    )


def parameter_shardings(
    shapes: dict, declarations: dict, mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES
) -> dict:
    """The NamedSharding of each parameter.

    Args:
      shapes: parameters or their ShapeDtypeStructs, nested dicts.
      declarations: a `Declaration` for each, in the same structure.
      mesh: the device mesh.
      rules: the mesh axes of logical axes.

    Raises UserError naming the first parameter whose dimension does not divide and has to, or that one mesh axis would
    cut twice.
    """

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct, declaration: Declaration) -> NamedSharding:
        stacked = leaf.ndim - len(declaration.axes)
        axes = (None,) * stacked + declaration.axes
        parts = list(spec(axes, rules.parameters, mesh))
        _check_once(path_name(path), axes, parts)
        for index, (axis, size, part) in enumerate(zip(axes, leaf.shape, parts, strict=True)):
            if size % shards(part, mesh):
                if axis in WHOLE_IF_UNEVEN:
                    parts[index] = None
                    continue
                raise UserError(
                    f"mesh: {path_name(path)} has {axis}={size}, which does not divide over the "
                    f"{shards(part, mesh)} devices of mesh.{part}."
                )
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree_util.tree_map_with_path(sharding, shapes, declarations)


def _check_once(name: str, axes: tuple[str | None, ...], parts: list) -> None:
    """Raises UserError where one mesh axis would cut two dimensions of a parameter."""
    owner: dict[str, str | None] = {}
    for axis, part in zip(axes, parts, strict=True):
        for place in (part,) if isinstance(part, str) else part or ():
            if place in owner:
                raise UserError(
                    f"mesh.parameter_rules: {place} cuts both {owner[place]} and {axis} of {name}; "
                    "give each mesh axis to one of them."
                )
            owner[place] = axis
