"""The device mesh: axes data, fsdp, seq and tensor over all visible devices."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from lcx.config import MeshConfig
from lcx.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(config: MeshConfig, chips: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that a config describes; one axis may be -1, which means the devices that the others leave.

    Args:
      config: devices along each axis.
      chips: the devices; None for all that are visible. Those of a topology that is not here serve to compile for it.

    Raises UserError where the axes do not fill the devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    devices = jax.device_count() if chips is None else len(chips)
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    described = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, got {described}.")
    if free and devices % taken == 0:
        sizes[free[0]] = devices // taken
    elif free or taken != devices:
        raise UserError(
            f"mesh: {described} does not fill the {devices} visible devices; their product must be {devices}."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chips)


def batch_shards(mesh: Mesh) -> int:
    """How many pieces a batch is cut into on this mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
