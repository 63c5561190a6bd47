"""How models call kernels: local functions on shards, manual over every axis of the ambient mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lcx.parallel.ring import ring_attention
from lcx.parallel.sequence import MeshAxis, gather, time_axis, time_over
from lcx.parallel.sharding import ambient_mesh, divisible_spec, shards
from lcx_kernels.attention import attention, fold_sinks
from lcx_kernels.backends import is_interpreted

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Shard:
    """Runs functions on the shards of arrays. Static: it holds no arrays, and the mesh is ambient."""

    def kernel(self, function: Callable, arrays: dict[str, Any], axes: dict[str, Axes], outputs: tuple) -> tuple:
        """Calls function(**arrays) on each device's shards.

        XLA cannot partition a kernel call by itself, so this is manual over all mesh axes, also where only the batch
        is cut. Everything that the function uses is an argument: a closed-over array would be local in silence. What
        it needs of the shards before its own it asks `parallel.sequence`.

        Args:
          function: from named arrays to a tuple of arrays.
          arrays: its arguments; None is passed on as None.
          axes: the logical axes of each argument ("batch", "time", "heads", "inner", ...).
          outputs: (shape, axes) of each result, shapes as of the whole arrays. One without a time axis must be the same
            on all shards of time, as what `sequence.last` gives.

        Returns: the tuple of whole results.
        """
        mesh = ambient_mesh()
        if mesh is None:
            return function(**arrays)
        given = {name: array for name, array in arrays.items() if array is not None}
        missing = {name: None for name, array in arrays.items() if array is None}
        specs = {name: divisible_spec(array.shape, axes[name], mesh) for name, array in given.items()}
        used = {axis for spec in specs.values() for axis in _mesh_axes(spec)}
        time = _cut_of_time({name: (axes[name], array.shape, specs[name]) for name, array in given.items()})

        def local(given: dict[str, jax.Array]) -> tuple:
            # Varying over every axis in use, so that a forgotten sum is refused when the program is traced.
            varying = {name: _cast_varying(array, used, specs[name]) for name, array in given.items()}
            with time_over(time):
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


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array,
    sinks: jax.Array | None = None,
    *,
    exchange: Literal["ring", "gather"] = "ring",
    backend: str = "auto",
) -> jax.Array:
    """Causal attention within documents over the whole sequence; for functions that `Shard.kernel` calls.

    Args:
      query: the shard's, [batch, time, heads, K].
      key, value: the shard's, [batch, time, kv_heads, K or V].
      documents: int32 [batch, time], numbers that count through the whole row.
      sinks: [heads], as of `lcx_kernels.attention.attention`.
      exchange: how shards of time see each other's keys: they travel round the ring, or each shard gathers all.
      backend: of the kernel.

    Returns: [batch, time, heads, V] in query's dtype.
    """
    axis = time_axis()
    if axis is None:
        return attention(query, key, value, segment_ids=documents, sinks=sinks, backend=backend)[0]
    if exchange == "ring":
        out, log_sum_exp = ring_attention(query, key, value, documents, axis=axis, backend=backend)
        if sinks is not None:  # once, when all keys have been seen
            out = fold_sinks(out, log_sum_exp, sinks)
        return out.astype(query.dtype)
    keys, values, their_documents = gather((key, value, documents))
    slots = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), their_documents.shape)
    own = jax.lax.dynamic_slice_in_dim(slots, jax.lax.axis_index(axis) * query.shape[1], query.shape[1], axis=1)
    alignment = dict(positions=(own, slots), segment_ids=(documents, their_documents))
    return attention(query, keys, values, **alignment, sinks=sinks, backend=backend)[0]


def _cut_of_time(arrays: dict[str, tuple[Axes, tuple[int, ...], jax.sharding.PartitionSpec]]) -> MeshAxis | None:
    """The mesh axis that cuts time, which must be one for all arrays. Raises ValueError where their lengths differ."""
    found = {}
    for name, (axes, shape, spec) in arrays.items():
        if "time" in axes:
            place = axes.index("time")
            found[name] = (shape[place], spec[place])
    if len(set(found.values())) > 1:
        lengths = ", ".join(f"{name} {length}" for name, (length, _) in found.items())
        raise ValueError(f"arrays of one kernel call have one length of time, got {lengths}")
    return next(iter(found.values()))[1] if found else None


def _mesh_axes(spec: jax.sharding.PartitionSpec) -> list[str]:
    return [axis for part in spec for axis in ((part,) if isinstance(part, str) else part or ())]


def _cast_varying(array: jax.Array, used: set[str], spec: jax.sharding.PartitionSpec) -> jax.Array:
    missing = tuple(sorted(used - set(_mesh_axes(spec))))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
