"""The device mesh: axes data, fsdp, seq and tensor over all devices."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from lcx.config import MESH_AXES, MeshConfig
from lcx.errors import UserError

AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)


def make_mesh(config: MeshConfig, chips: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config describes; one axis may be -1, which means the devices that the others leave.

    Neighbours on an axis are neighbours on the chips' own network where it is a torus, as it is in a TPU slice. Several
    slices, which a slower network connects, differ in their place on the data axis alone.

    Args:
      config: devices along each axis.
      chips: the devices; None for all that are visible. Those of a topology that is not here serve to compile for it.

    Raises UserError where the axes do not fill the devices, or data does not divide over the slices.
    """
    chips = jax.devices() if chips is None else chips
    shape = axis_sizes(config, len(chips))
    slices = len({getattr(chip, "slice_index", 0) for chip in chips})
    if shape[0] % slices:
        raise UserError(
            f"mesh: data={shape[0]} does not divide over the {slices} slices that these devices are in; only the axis "
            "data crosses the slow network between slices: make it a multiple of their number."
        )
    if slices > 1:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        devices = mesh_utils.create_hybrid_device_mesh(inside, across, chips, allow_split_physical_axes=True)
    else:
        devices = mesh_utils.create_device_mesh(shape, chips, allow_split_physical_axes=True)
    return Mesh(devices, MESH_AXES, axis_types=AXIS_TYPES)


def axis_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """How many devices of that number lie along each axis. Raises UserError where the axes do not fill them."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    described = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if free and devices % taken == 0:
        sizes[free[0]] = devices // taken
    elif free or taken != devices:
        raise UserError(
            f"mesh: {described} does not fill the {devices} visible devices; their product must be {devices}."
        )
    return tuple(sizes.values())


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """A mesh of that shape without devices: all visible ones where it fills them, else as many as its axes name."""
    visible, named = jax.device_count(), math.prod(max(getattr(config, axis), 1) for axis in MESH_AXES)
    free = any(getattr(config, axis) == -1 for axis in MESH_AXES)
    shape = axis_sizes(config, visible if free and visible % named == 0 else named)
    return AbstractMesh(shape, MESH_AXES, axis_types=AXIS_TYPES)
