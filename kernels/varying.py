"""Mesh axes over which arrays vary inside a shard_map, for kernels that XLA knows nothing about.

JAX derives these axes for its own operations. The results of a custom call must declare them, and its arguments should
agree on them.
"""

from typing import Any

import jax


def varying_axes(arrays: Any) -> frozenset[str]:
    """The mesh axes over which any array of a tree varies; none outside of a shard_map with checked axes."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)))


def vary_alike(arrays: Any) -> Any:
    """Cast all arrays of a tree to vary over the axes over which any does; gradients are summed accordingly."""
    axes = varying_axes(arrays)

    def cast(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, arrays)


def varying_struct(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """The declaration of a custom call's result that varies over ``axes``."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))


def vary_as(inputs: Any, outputs: Any) -> tuple[jax.Array, ...]:
    """The outputs of a custom call that cannot declare them, varying over mesh axes as its inputs do."""
    axes = tuple(sorted(varying_axes(inputs)))
    return tuple(jax.lax.pcast(output, axes, to="varying") if axes else output for output in outputs)
