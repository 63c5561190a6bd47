"""From logical axes to mesh axes: one table for parameters, one for activations."""

from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lcx.errors import UserError
from lcx.params import Declaration, path_name

Rules = Mapping[str, tuple[str, ...]]

# A name that is not in a table is not sharded.
PARAMETER_RULES: Rules = {
    "d_model": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "groups": ("tensor",),
    "inner": ("tensor",),
    "d_ff": ("tensor",),
}
ACTIVATION_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "time": ("seq",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "groups": ("tensor",),
    "inner": ("tensor",),
    "d_ff": ("tensor",),
}
# Axes of parameters that every device has whole where they do not divide: few groups serve many heads.
WHOLE_IF_UNEVEN = frozenset({"groups"})


def spec(axes: tuple[str | None, ...], rules: Rules, mesh: jax.sharding.AbstractMesh) -> PartitionSpec:
    """The partition of an array with these logical axes. Mesh axes of one device are left out."""
    parts = []
    for axis in axes:
        used = tuple(name for name in rules.get(axis, ()) if mesh.shape[name] > 1)
        parts.append(used[0] if len(used) == 1 else used or None)
    return PartitionSpec(*parts)


def shards(part: str | tuple[str, ...] | None, mesh: jax.sharding.AbstractMesh) -> int:
    """The number of pieces that one entry of a PartitionSpec cuts a dimension into."""
    count = 1
    for name in (part,) if isinstance(part, str) else part or ():
        count *= mesh.shape[name]
    return count


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh that is in force where a program is traced; None where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def activation_sharding(axes: tuple[str | None, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an activation, or of a batch's array, with these logical axes."""
    return NamedSharding(mesh, spec(axes, ACTIVATION_RULES, mesh))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Asks that an activation be laid out by the rules on the ambient mesh; without one it is left alone.

    A dimension that does not divide stays whole: a prompt of one row on eight devices is computed on each.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(x.shape, axes, mesh))


def divisible_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: jax.sharding.AbstractMesh
) -> PartitionSpec:
    """The partition by the activation rules, without the dimensions that do not divide."""
    wanted = spec(axes, ACTIVATION_RULES, mesh)
    return PartitionSpec(
        *(part if size % shards(part, mesh) == 0 else None for size, part in zip(shape, wanted, strict=True))
    )


def parameter_shardings(shapes: dict, declarations: dict, mesh: jax.sharding.Mesh) -> dict:
    """The NamedSharding of each parameter.

    Args:
      shapes: parameters or their ShapeDtypeStructs, nested dicts.
      declarations: a `Declaration` for each, in the same structure.
      mesh: the device mesh.

    Raises UserError naming the first parameter whose dimension does not divide and has to.
    """

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct, declaration: Declaration) -> NamedSharding:
        stacked = leaf.ndim - len(declaration.axes)
        axes = (None,) * stacked + declaration.axes
        parts = list(spec(axes, PARAMETER_RULES, mesh))
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
