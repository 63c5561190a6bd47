"""How models call kernels: local functions on shards, manual over every axis of the ambient mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lcx.parallel.sharding import ambient_mesh, divisible_spec, shards
from lcx_kernels.backends import is_interpreted

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Shard:
    """Runs functions on the shards of arrays. Static: it holds no arrays, and the mesh is ambient."""

    def kernel(self, function: Callable, arrays: dict[str, Any], axes: dict[str, Axes], outputs: tuple) -> tuple:
        """Calls function(**arrays) on each device's shards.

        XLA cannot partition a kernel call by itself, so this is manual over all mesh axes, also where only the batch
        is cut. Everything that the function uses is an argument: a closed-over array would be local in silence.

        Args:
          function: from named arrays to a tuple of arrays.
          arrays: its arguments; None is passed on as None.
          axes: the logical axes of each argument ("batch", "time", "heads", "inner", ...).
          outputs: (shape, axes) of each result, shapes as of the whole arrays.

        Returns: the tuple of whole results.
        """
        mesh = ambient_mesh()
        if mesh is None:
            return function(**arrays)
        given = {name: array for name, array in arrays.items() if array is not None}
        missing = {name: None for name, array in arrays.items() if array is None}
        specs = {name: divisible_spec(array.shape, axes[name], mesh) for name, array in given.items()}
        used = {axis for spec in specs.values() for axis in _mesh_axes(spec)}

        def local(given: dict[str, jax.Array]) -> tuple:
            # Varying over every axis in use, so that a forgotten sum is refused when the program is traced.
            varying = {name: _cast_varying(array, used, specs[name]) for name, array in given.items()}
            return function(**varying, **missing)

        out_specs = tuple(divisible_spec(shape, out_axes, mesh) for shape, out_axes in outputs)
        checked = not is_interpreted()  # Pallas cannot say there over which axes its results vary
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=checked)(given)

    def groups_for(self, heads: int, groups: jax.Array) -> jax.Array:
        """Groups that can be cut where the heads that read them are cut.

        Head h reads group h // (heads / groups). A shard of the heads that had all of several groups could not tell
        which of them are its own, so groups are repeated, side by side, until every shard has some for itself alone.
        A lone group is everyone's.

        Args:
          heads: how many there are on all devices together, of the logical axis "heads".
          groups: [batch, time, groups, ...], of the logical axis "groups".
        """
        mesh, count = ambient_mesh(), groups.shape[2]
        if mesh is None or count == 1:
            return groups
        (part,) = divisible_spec((heads,), ("heads",), mesh)
        return jnp.repeat(groups, math.lcm(count, shards(part, mesh)) // count, axis=2)


def _mesh_axes(spec: jax.sharding.PartitionSpec) -> list[str]:
    return [axis for part in spec for axis in ((part,) if isinstance(part, str) else part or ())]


def _cast_varying(array: jax.Array, used: set[str], spec: jax.sharding.PartitionSpec) -> jax.Array:
    missing = tuple(sorted(used - set(_mesh_axes(spec))))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
