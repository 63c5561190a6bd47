"""What the chunked memory's Pallas kernels for TPU share: products, sums over stretches of tokens, heads on lanes.

Values are [tokens, lanes], with the lanes of one or several heads side by side, or [tokens, tokens]: row t, column s.
A column is [tokens, 1], a row [1, tokens].

A NaN must not leave its document, nor go back in time, and 0 times NaN is NaN. So a product that sums over tokens gets
cleaned operands: the rows of tokens that hold anything else than finite numbers are emptied (`cleaned`). What they are
worth is kept as a column, 0 or NaN (`worth`), and added again where they are seen.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx_kernels.varying import varying_axes, varying_struct

LANES = 128
SUBLANES = 16  # tokens come in multiples of it: rows of a packed register of bfloat16
_MARGIN = 24 * 2**20  # bytes of VMEM for values that do not stay in registers, above blocks and scratch


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def widened(width: int, heads: int) -> int:
    """The lanes that a head gets: 64 where two share a register, else a multiple of 128."""
    return LANES // 2 if width <= LANES // 2 and heads % 2 == 0 else round_up(width, LANES)


# Products.


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product over axis ``axes[0]`` of a and ``axes[1]`` of b, summed in float32 (float64 if an operand is).

    Of float32 operands nothing is rounded: with each other they take the six passes of Precision.HIGHEST, with bfloat16
    the three that the float32 side needs.
    """
    if axes[0] == 0:  # turned by hand: compilers for TPU have failed to, where bfloat16 has over 128 tokens
        return dot(a.astype(jnp.promote_types(a.dtype, jnp.float32)).T.astype(a.dtype), b, (1, axes[1]))
    if a.dtype == b.dtype == jnp.bfloat16:
        return _product(a, b, axes)
    if a.dtype == jnp.bfloat16:
        return sum(_product(a, part, axes) for part in _bfloat16_parts(b))
    if b.dtype == jnp.bfloat16:
        return sum(_product(part, b, axes) for part in _bfloat16_parts(a))
    return _product(a, b, axes, jax.lax.Precision.HIGHEST)


def _product(a, b, axes, precision=None) -> jax.Array:
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=dtype)


def _bfloat16_parts(array: jax.Array) -> list[jax.Array]:
    """Three arrays whose sum is a float32 array, the least first. Cut off by bits: no compiler sees through it."""
    parts = []
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(array, jnp.int32) & np.int32(-(2**16))
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(high.astype(jnp.bfloat16))
        array = array - high
    return [array.astype(jnp.bfloat16), *reversed(parts)]


# Tokens.


def places(size: int) -> tuple[jax.Array, jax.Array]:
    """The row's and the column's number, int32 [size, size]."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def where(mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """The values where the mask is set or missing, 0 elsewhere."""
    return values if mask is None else jnp.where(mask, values, jnp.zeros_like(values))


def as_column(row: jax.Array) -> jax.Array:
    """[1, tokens] to [tokens, 1]."""
    t, s = places(row.shape[1])
    return where(t == s, jnp.broadcast_to(row, t.shape)).sum(axis=1, keepdims=True)


def as_row(column: jax.Array) -> jax.Array:
    """[tokens, 1] to [1, tokens]."""
    t, s = places(column.shape[0])
    return where(t == s, jnp.broadcast_to(column, t.shape)).sum(axis=0, keepdims=True)


def sums_down(values: jax.Array, reverse: bool = False) -> jax.Array:
    """Sums over the rows up to each (from each on, if ``reverse``), by doubling: never a difference of two sums."""
    size = values.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    shift = 1
    while shift < size:
        if reverse:
            values = values + where(row < size - shift, pltpu.roll(values, size - shift, 0))
        else:
            values = values + where(row >= shift, pltpu.roll(values, shift, 0))
        shift *= 2
    return values


def worth(*arrays: jax.Array) -> jax.Array:
    """A column: 0 for tokens that hold finite numbers in all the arrays, else NaN."""
    return sum((array * 0).sum(axis=1, keepdims=True) for array in arrays)


def cleaned(values: jax.Array, worth: jax.Array, inside: jax.Array | None) -> jax.Array:
    """The values, 0 for tokens that are worth NaN or not inside."""
    mask = worth == 0
    return where(mask if inside is None else mask & inside, values)


def seen(mask: jax.Array | None, worth: jax.Array) -> jax.Array:
    """[1, 1]: NaN if a token under the mask is worth NaN, else 0."""
    return where(mask, worth).sum(axis=0, keepdims=True)


# Heads.


@dataclass(frozen=True)
class Lanes:
    """``count`` heads of ``width`` lanes, side by side."""

    width: int
    count: int

    @property
    def size(self) -> int:
        return self.width * self.count

    @property
    def aligned(self) -> bool:
        return self.width % LANES == 0

    def _mask(self, head: int, values: jax.Array) -> jax.Array:
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, values.shape[1]), 1)
        return (lane >= head * self.width) & (lane < (head + 1) * self.width)

    def only(self, values: jax.Array, head: int) -> jax.Array:
        """All lanes, 0 outside of the head's."""
        return values if self.count == 1 else where(self._mask(head, values), values)

    def part(self, values: jax.Array, head: int) -> jax.Array:
        """One operand of a product over lanes that is to be this head's alone; `near` is the other."""
        return self.near(values, head) if self.aligned or self.count == 1 else self.only(values, head)

    def near(self, values: jax.Array, head: int) -> jax.Array:
        """The head's lanes, perhaps among others."""
        whole = self.count == 1 or not self.aligned
        return values if whole else values[:, head * self.width : (head + 1) * self.width]

    def merge(self, parts: list[jax.Array]) -> jax.Array:
        """All heads' lanes, from what each has near its own."""
        if self.count == 1:
            return parts[0]
        return jnp.concatenate(parts, axis=1) if self.aligned else self.spread(parts)

    def spread(self, columns: list[jax.Array]) -> jax.Array:
        """A column (or all lanes) a head, to the lanes of each head."""
        if self.count == 1:
            return columns[0]
        lane = jax.lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], self.size), 1)
        found = jnp.broadcast_to(columns[0], lane.shape)
        for head in range(1, self.count):
            found = jnp.where(lane >= head * self.width, columns[head], found)
        return found

    def sum(self, values: jax.Array, head: int) -> jax.Array:
        """A column: the sum over a head's lanes."""
        return self.part(values, head).sum(axis=1, keepdims=True)


def expand(keys: Lanes, values: Lanes, memory: jax.Array) -> jax.Array:
    """A tile's state [K, lanes of values] for products with its keys: [lanes of keys, lanes of values].

    Keys that all heads share are one head.
    """
    if keys.count == 1:
        return memory
    return where(_own(keys, values), jnp.concatenate([memory] * keys.count, axis=0))


def fold(keys: Lanes, values: Lanes, product: jax.Array) -> jax.Array:
    """Of the product of a tile's keys and values, what each head has with itself: [K, lanes of values]."""
    if keys.count == 1:
        return product
    product, width = where(_own(keys, values), product), keys.width
    return sum(product[head * width : (head + 1) * width] for head in range(keys.count))


def _own(keys: Lanes, values: Lanes) -> jax.Array:
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (keys.size, values.size), axis) for axis in (0, 1))
    return jax.lax.div(row, np.int32(keys.width)) == jax.lax.div(lane, np.int32(values.width))


# Arrays outside of kernels, and their blocks.


def flat(array: jax.Array | None, width: int) -> jax.Array | None:
    """[batch, time, heads, K] to [batch, time, heads * width]; what is neither bfloat16 nor float64 becomes float32."""
    if array is None:
        return None
    if array.dtype != jnp.bfloat16:
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    missing = width - array.shape[3]
    array = jnp.pad(array, [(0, 0)] * 3 + [(0, missing)]) if missing else array
    return array.reshape(*array.shape[:2], -1)


def flat_state(memory: jax.Array, keys: Lanes, values: Lanes, dtype: Any) -> jax.Array:
    """[batch, heads, K, V] to [batch, lanes of a head's keys, heads * lanes of its values]: no lanes stay empty."""
    batch, _, width, depth = memory.shape
    memory = memory.astype(dtype).transpose(0, 2, 1, 3)
    missing = keys.width - width, values.width - depth
    if any(missing):
        memory = jnp.pad(memory, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
    return memory.reshape(batch, keys.width, -1)


def heads_of_state(memory: jax.Array, heads: int, width: int, depth: int) -> jax.Array:
    """The inverse of `flat_state`."""
    memory = memory.reshape(*memory.shape[:2], heads, -1)
    return memory[:, :width, :, :depth].transpose(0, 2, 1, 3)


def itemsize(*arrays: jax.Array | None) -> int:
    """Bytes of an element in blocks, of the widest: see `flat`; 4 for float64, which is only interpreted."""
    return 2 if all(array.dtype == jnp.bfloat16 for array in arrays if array is not None) else 4


def narrowed(array: jax.Array, width: int) -> jax.Array:
    """The first ``width`` of the last axis."""
    return array if array.shape[-1] == width else array[..., :width]


def share(batch: int, tiles: int, most: int, groups: int = 1) -> int:
    """How many of a group's tiles a program gets: as many as may be that leave even work for two cores."""
    fitting = [count for count in range(1, tiles + 1) if tiles % count == 0 and count <= max(most, 1)]
    even = [count for count in fitting if batch * groups * (tiles // count) % 2 == 0]
    return max(even or fitting)


def read(ref: Any, lanes: Any, dtype: Any) -> jax.Array:
    """Lanes of a block in the dtype of the arithmetic; bfloat16 stays as it is, for products."""
    block = ref[:, lanes]
    return block if block.dtype == jnp.bfloat16 and dtype == np.float32 else block.astype(dtype)


def read_clean(ref: Any, lanes: Any, inside: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Also the same `cleaned`, and what its tokens are `worth`."""
    block = read(ref, lanes, dtype)
    wide = block.astype(dtype)
    value = where(inside, worth(wide))
    return block, cleaned(wide, value, inside).astype(block.dtype), value


# Calls.


def each(count: int, body: Callable[[Any], None]) -> None:
    """body(i) for each i: unrolled if there are few, so that they may overlap."""
    if count <= 2:
        for i in range(count):
            body(i)
    else:
        jax.lax.fori_loop(np.int32(0), np.int32(count), lambda i, _: body(i), None)


def stretch(index: Any, size: int) -> Any:
    """The place of a block of ``size`` lanes in a reference."""
    if isinstance(index, int):
        return pl.ds(index * size, size)
    start = index * np.int32(size)
    return pl.ds(pl.multiple_of(start, math.gcd(size, LANES)), size)


def call(kernel: Callable, name: str, plan: Any, inputs: dict, outputs: dict, scratch: dict) -> dict:
    """Runs a kernel: kernel(plan, references of inputs, of outputs, of scratch), each by name.

    Args:
      plan: has grid (the last dimension in order), dtype, interpret.
      inputs: by name, (array, spec); an array of None is left out. outputs: (shape, dtype, spec). scratch: shapes.
    """
    inputs = {key: pair for key, pair in inputs.items() if pair[0] is not None}
    arrays = {key: array for key, (array, _) in inputs.items()}
    axes = varying_axes(arrays)
    run = pl.pallas_call(
        functools.partial(_by_name, kernel, plan, tuple(scratch)),
        grid=plan.grid,
        in_specs=[{key: spec for key, (_, spec) in inputs.items()}],
        out_specs={key: spec for key, (_, _, spec) in outputs.items()},
        out_shape={key: varying_struct(shape, dtype, axes) for key, (shape, dtype, _) in outputs.items()},
        scratch_shapes=[pltpu.VMEM(shape, plan.dtype) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(plan.grid) - 1) + ("arbitrary",),
            vmem_limit_bytes=_vmem_bytes(inputs, outputs, scratch, plan.dtype) + _MARGIN,
        ),
        interpret=plan.interpret,
        name=name,
    )
    return run(arrays)


def _by_name(kernel, plan, names, inputs, outputs, *scratch):
    kernel(plan, inputs, outputs, dict(zip(names, scratch, strict=True)))


def _vmem_bytes(inputs: dict, outputs: dict, scratch: dict, dtype: Any) -> int:
    """Of all blocks, twice (one is computed on while the next is copied), and of the scratch."""

    def size(shape, dtype):
        itemsize = np.dtype(dtype).itemsize
        *outer, rows, lanes = (1 if part is None else part for part in shape)
        return int(np.prod(outer)) * round_up(rows, 32 // itemsize) * round_up(lanes, LANES) * itemsize

    blocks = [(spec.block_shape, array.dtype) for array, spec in inputs.values()]
    blocks += [(spec.block_shape, dtype) for _, dtype, spec in outputs.values()]
    return sum(2 * size(*block) for block in blocks) + sum(size(shape, dtype) for shape in scratch.values())
