"""What Pallas TPU calls cost, read from the calls as they are lowered: their grids, blocks and index maps."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core
import numpy as np

LANES = 128


@dataclass(frozen=True)
class Call:
    """One pallas_call of a traced program."""

    name: str
    grid: tuple[int, ...]
    semantics: tuple[str, ...]  # of the grid's dimensions
    blocks: tuple[Any, ...]  # JAX's block mappings, of inputs, then outputs
    scratch: tuple[Any, ...]

    @property
    def parallel_programs(self) -> int:
        """Stretches of the grid that cores may share out among them."""
        return math.prod(size for size, kind in zip(self.grid, self.semantics, strict=True) if kind == "parallel")

    def vmem_bytes(self) -> int:
        """Of scratch, and of all blocks twice: one is computed on while the next is copied."""
        blocks = sum(_padded_bytes(block.block_aval) for block in self.blocks if not _in_smem(block))
        return 2 * blocks + sum(map(_padded_bytes, self.scratch))

    def traffic(self) -> int:
        """Bytes copied between memory and the core: a block's whenever its index differs from the step before.

        Blocks at the end of an array count as far as the array goes, rounded up to whole tiles of memory.
        """
        points = np.indices(self.grid, dtype=np.int32).reshape(len(self.grid), -1)
        return sum(_traffic(block, points) for block in self.blocks)


def pallas_calls(function: Any, *arguments: Any) -> list[Call]:
    """The Pallas calls of ``function``, traced on abstract arguments, in order."""
    calls = [equation for equation in _equations(jax.make_jaxpr(function)(*arguments).jaxpr) if _is_call(equation)]
    return [_call(equation) for equation in calls]


FREE = ("broadcast_in_dim", "name", "pvary", "reshape")  # read and write nothing: `name` is not in the program at all


def bytes_around(function: Any, *arguments: Any) -> int:
    """What the other operations of ``function`` read and write if none of them are fused: too much rather than not."""
    total = 0
    for equation in _equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if not _is_call(equation) and equation.primitive.name not in FREE:
            arrays = itertools.chain(equation.invars, equation.outvars)
            total += sum(_bytes(array.aval) for array in arrays if array.aval.shape)
    return total


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations at any depth, outside of kernels; of a loop or a branch once."""
    for equation in jaxpr.eqns:
        inner = [] if _is_call(equation) else list(jax.extend.core.jaxprs_in_params(equation.params))
        if not inner:
            yield equation
        for sub in inner:
            yield from _equations(sub)


def _is_call(equation: Any) -> bool:
    return equation.primitive.name == "pallas_call"


def _call(equation: Any) -> Call:
    mapping = equation.params["grid_mapping"]
    given = iter(equation.params["compiler_params"].dimension_semantics)
    mapped = set(mapping.vmapped_dims)  # JAX makes these parallel
    return Call(
        name=equation.params["name"],
        grid=mapping.grid,
        semantics=tuple("parallel" if i in mapped else next(given) for i in range(len(mapping.grid))),
        blocks=tuple(mapping.block_mappings),
        scratch=tuple(mapping.scratch_avals),
    )


def _in_smem(block: Any) -> bool:
    return "smem" in str(block.block_aval)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _padded(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A shape with its last axes as long as in memory, where a tile is 128 lanes by 32 bytes of rows."""
    *outer, rows, lanes = (1, *shape) if len(shape) == 1 else shape
    rows = rows if rows == 1 else -(-rows // (32 // itemsize)) * (32 // itemsize)
    return (*outer, rows, -(-lanes // LANES) * LANES)


def _padded_bytes(aval: Any) -> int:
    return math.prod(_padded(aval.shape, aval.dtype.itemsize)) * aval.dtype.itemsize


def _traffic(block: Any, points: np.ndarray) -> int:
    sizes = np.array([getattr(part, "block_size", 1) for part in block.block_shape])
    array = block.array_aval
    itemsize = array.dtype.itemsize
    shape = array.shape if _in_smem(block) else _padded(array.shape, itemsize)
    index_map = jax.vmap(jax.extend.core.jaxpr_as_fun(block.index_map_jaxpr))
    columns = [np.asarray(column) for column in index_map(*points)]
    indices = np.stack([np.broadcast_to(column, points.shape[1]) for column in columns])
    copied = np.ones(points.shape[1], bool)
    copied[1:] = (indices[:, 1:] != indices[:, :-1]).any(axis=0)
    starts = indices[:, copied] * sizes[:, None]
    extents = np.minimum(sizes[:, None], np.array(shape)[:, None] - starts)
    assert (extents > 0).all(), f"{block.origin}: a block outside of the array"
    return int(extents.astype(object).prod(axis=0).sum()) * itemsize
