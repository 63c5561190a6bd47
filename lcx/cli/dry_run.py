"""`lcx train --dry_run`: where everything would lie, from shapes alone."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lcx.config import Config
from lcx.parallel.mesh import abstract_mesh
from lcx.params import path_name
from lcx.training.train_state import TrainState
from lcx.training.trainer import make_program

HEADINGS = ("parameter", "shape", "dtype", "cut over", "bytes per device")
KINDS = {"params": "parameters", "opt_state": "optimizer", "": "all of the state"}


def layout(config: Config | Mapping[str, Any]) -> str:
    """A table with a line a parameter: shape, mesh axes of each dimension, bytes on one device; and the sums.

    The mesh need not be here: one that names all its axes is taken as it is. Raises UserError for what cannot be
    trained, as a run does.
    """
    config = Config.from_dict(config)
    mesh = abstract_mesh(config.mesh)
    state = make_program(config, mesh).abstract
    rows = [HEADINGS, *(row(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.params))]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, cells[:-1], widths)) + cells[-1].rjust(widths[-1] + 2) for cells in rows]
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    here = "" if mesh.size == jax.device_count() else f"; {jax.device_count()} visible here"
    return "\n".join([*lines, "", f"mesh {shape}: {mesh.size} devices{here}", *sums(state)])


def row(path: tuple, leaf: jax.ShapeDtypeStruct) -> tuple[str, ...]:
    """The cells of a parameter."""
    parts = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
    places = ["-" if part is None else part if isinstance(part, str) else " ".join(part) for part in parts]
    return path_name(path), str(leaf.shape), str(leaf.dtype), f"({', '.join(places)})", f"{device_bytes(leaf):,}"


def sums(state: TrainState) -> list[str]:
    """Bytes on one device, by kind."""
    found = []
    for name, kind in KINDS.items():
        leaves = jax.tree.leaves(getattr(state, name) if name else state)
        found.append(f"{kind}: {sum(map(device_bytes, leaves)):,} bytes per device")
    return found


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array."""
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size
