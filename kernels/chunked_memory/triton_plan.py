"""How the chunked memory's Triton kernels are launched: block sizes by shape, grids, arguments in order.

Nothing here needs Triton, JAX or a GPU: `triton_gpu` runs the launches, and the tests run them in Triton's interpreter.
Where states and blocks of them are too few to fill a GPU, time is cut into spans of chunks: where each gets from zero,
then the states between them, then the states before all chunks. What tokens read, and their gradients, are computed
from the states before (and after) their chunk, of all chunks at once.
"""

import math
from typing import Any, NamedTuple

# Programs below which time is cut, and how many are then wanted: 2 and 4 for each of an H100's 132 multiprocessors.
FEWEST_PROGRAMS = 264
WANTED_PROGRAMS = 528
# Chunks that a span should have at least: each span costs a state written and read a few times.
SHORTEST_SPAN = 4
LARGEST_WIDTH = 128


class Launch(NamedTuple):
    """One kernel launch. The kernel's parameters are inputs, scalars and outputs, in this order, then the constants."""

    kernel: str
    programs: int
    warps: int
    inputs: tuple[Any, ...]
    scalars: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], Any], ...]  # shape and dtype of each
    constants: dict[str, Any]


class Shape(NamedTuple):
    """The sizes of a call; heads are of states, lanes the larger number of heads, of queries or states."""

    batch: int
    time: int
    heads: int
    q_heads: int
    k_heads: int
    v_heads: int
    K: int
    V: int

    @property
    def lanes(self) -> int:
        return max(self.heads, self.q_heads)


class Plan(NamedTuple):
    """The launches' sizes.

    Attributes:
      narrow: operands of products are bfloat16, else float32.
      chunk: tokens of a chunk.
      spans, length: pieces of time, and tokens of each but the last, a multiple of the chunk.
      together: lanes that share queries and keys and whose gradients one program computes.
    """

    shape: Shape
    narrow: bool
    chunk: int
    spans: int
    length: int
    together: int

    @property
    def chunks(self) -> int:
        return math.ceil(self.shape.time / self.chunk)


class Inputs(NamedTuple):
    """The arrays of a call, None where absent; reset is int8. Arrays beside them are named as in `triton_kernels`."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    reset: Any


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def padded(width: int) -> int:
    """A power of two that tensor cores take."""
    return max(16, _power_of_two(width))


def make_plan(shape: Shape, narrow: bool, chunk_size: int) -> Plan:
    """The sizes by shape; ``chunk_size`` is an upper limit, down to 16.

    Tiles of float32 take more than twice the registers: products of them are three, of parts.
    """
    largest = 64 if narrow else 16
    chunk = max(16, min(largest, _power_of_two(chunk_size + 1) // 2, _power_of_two(shape.time)))
    count = shape.batch * shape.heads * math.prod(carried_blocks(shape))
    spans = 1
    if count < FEWEST_PROGRAMS:
        spans = max(1, min(math.ceil(WANTED_PROGRAMS / count), shape.time // (SHORTEST_SPAN * chunk)))
    length = math.ceil(shape.time / spans / chunk) * chunk
    together = sharing = shape.lanes // max(shape.q_heads, shape.k_heads)
    chunks = shape.batch * math.ceil(shape.time / chunk)
    while together > 1 and (sharing % together or chunks * shape.lanes // together < FEWEST_PROGRAMS):
        together -= 1
    return Plan(shape, narrow, chunk, math.ceil(shape.time / length), length, together)


def programs(number: int) -> int:
    if number >= 2**31:
        raise ValueError(f"batch: {number} programs are needed, more than a grid has")
    return number


def _contracted(plan: Plan) -> int:
    """Key channels that a product sums over at once: registers hold operands of float32."""
    return min(padded(plan.shape.K), 128 if plan.narrow else 32)


def carried_blocks(shape: Shape) -> tuple[int, int]:
    return math.ceil(shape.K / min(64, padded(shape.K))), math.ceil(shape.V / min(64, padded(shape.V)))


def _flags(plan: Plan, inputs: Inputs, normalize: bool) -> dict[str, Any]:
    return {
        "HAS_DECAY": inputs.log_decay is not None,
        "HAS_RESET": inputs.reset is not None,
        "HAS_SLOPE": normalize,
        "NARROW": plan.narrow,
        "C": plan.chunk,
        "HEADS": plan.shape.heads,
        "K": plan.shape.K,
        "V": plan.shape.V,
    }


def _heads(shape: Shape) -> dict[str, int]:
    return {"Q_HEADS": shape.q_heads, "K_HEADS": shape.k_heads, "V_HEADS": shape.v_heads, "LANES": shape.lanes}


def present(arrays: tuple, placeholder: Any) -> tuple:
    """Kernels take an array for each pointer; one that is absent is not touched."""
    return tuple(placeholder if array is None else array for array in arrays)


def carry(
    plan: Plan, inputs: Inputs, normalize: bool, start: tuple, dtypes: tuple, *, dy=None, weights=(None, None),
    keep: bool, summary: bool,
) -> Launch:  # fmt: skip
    """The states through time, of the tokens' keys and values; with ``dy`` their gradients, from the end.

    Args:
      start: memory [batch, spans, heads, K, V] and normaliser, or None.
      dtypes: of products' operands and of sums, (bfloat16 or float32, float32).
      weights: of `dy`, what multiplies it and what the normalisers get, as in `gradients`.
    """
    shape, back = plan.shape, dy is not None
    per_span = (shape.batch, plan.spans, shape.heads)
    per_chunk = (shape.batch, plan.chunks, shape.heads)
    narrow, wide = dtypes
    nothing = ((1,), wide)
    outputs = (
        ((*per_chunk, shape.K, shape.V), narrow) if keep else nothing,
        ((*per_chunk, shape.K), wide) if keep and normalize else nothing,
        ((*per_span, shape.K, shape.V), wide),
        ((*per_span, shape.K), wide) if normalize else nothing,
        (per_span, wide) if summary else nothing,
        (per_span, wide) if summary else nothing,
    )
    x, y = (inputs.q, dy) if back else (inputs.k, inputs.v)
    readers = shape.lanes // shape.heads if back else 1
    heads = (shape.q_heads, shape.lanes) if back else (shape.k_heads, shape.v_heads)
    constants = {
        "BACK": back, "KEEP": keep, "SUMMARY": summary, "READERS": readers, "X_HEADS": heads[0], "Y_HEADS": heads[1],
        "BLOCK_K": min(64, padded(shape.K)), "BLOCK_V": min(64, padded(shape.V)),
    }  # fmt: skip
    return Launch(
        "carry",
        programs(math.prod(per_span) * math.prod(carried_blocks(shape))),
        4,
        present((x, y, inputs.log_decay, inputs.reset, *weights, *start), x),
        (shape.time, plan.length, plan.spans),
        outputs,
        constants | _flags(plan, inputs, normalize),
    )


def outputs(plan: Plan, inputs: Inputs, normalize: bool, borders: tuple, dtypes: tuple) -> Launch:
    """What is read, in the first of ``dtypes``, and the denominators, in the second."""
    shape = plan.shape
    block = min(64, padded(shape.V))
    per_token = (shape.batch, shape.time, shape.lanes)
    out, wide = dtypes
    return Launch(
        "outputs",
        programs(shape.batch * plan.chunks * shape.lanes * math.ceil(shape.V / block)),
        _warps(plan),
        present((*inputs, *borders), inputs.k),
        (shape.time,),
        (((*per_token, shape.V), out), (per_token, wide) if normalize else ((1,), wide)),
        _flags(plan, inputs, normalize) | _heads(shape) | {"BLOCK_K": _contracted(plan), "BLOCK_V": block},
    )


class Cotangents(NamedTuple):
    """What `value_gradients` and `key_gradients` read beside the inputs.

    Attributes: dy, the gradient of out; weights, late: None or (None, None) where absent.
    """

    dy: Any
    weights: tuple
    borders: tuple
    late: tuple

    def arrays(self, inputs: Inputs) -> tuple:
        return present((*inputs, self.dy, *self.weights, *self.borders, *self.late), inputs.k)


def value_gradients(
    plan: Plan, inputs: Inputs, normalize: bool, cotangents: Cotangents, dtype: Any, *, of_values: bool = True,
    of_decay: bool = True, correcting: bool = False, partial: Any = None,
) -> Launch:  # fmt: skip
    """The gradients of v and log_decay, of as many heads as lanes; see the kernel for the options.

    In the arrays' dtypes where none is left to be added up, else in ``dtype``; in ``partial`` if that is given.
    """
    shape, of_decay = plan.shape, of_decay and inputs.log_decay is not None
    per_token = (shape.batch, shape.time, shape.lanes)
    nothing = ((1,), dtype)
    return Launch(
        "value_gradients",
        programs(shape.batch * plan.chunks * shape.lanes),
        _warps(plan),
        cotangents.arrays(inputs),
        (shape.time,),
        (
            ((*per_token, shape.V), partial or (inputs.v.dtype if shape.v_heads == shape.lanes else dtype))
            if of_values
            else nothing,
            (per_token, dtype) if of_decay else nothing,
        ),
        _flags(plan, inputs, normalize)
        | _heads(shape)
        | _of_cotangents(cotangents, correcting)
        | {"OF_VALUES": of_values, "OF_DECAY": of_decay, "BLOCK_K": _contracted(plan), "BLOCK_V": summed(shape.V)},
    )


def key_gradients(
    plan: Plan, inputs: Inputs, normalize: bool, cotangents: Cotangents, dtype: Any, *, correcting: bool = False,
    partial: bool = False,
) -> Launch:  # fmt: skip
    """The gradients of q and k, of as many heads as groups of lanes; dtypes and options as of `value_gradients`."""
    shape = plan.shape
    groups, block = shape.lanes // plan.together, min(64 if plan.narrow else 32, padded(shape.K))

    def gradient(array, heads: int) -> tuple:
        return (shape.batch, shape.time, groups, shape.K), array.dtype if heads == groups and not partial else dtype

    return Launch(
        "key_gradients",
        programs(shape.batch * plan.chunks * groups * math.ceil(shape.K / block)),
        _warps(plan),
        cotangents.arrays(inputs),
        (shape.time,),
        (gradient(inputs.q, shape.q_heads), gradient(inputs.k, shape.k_heads)),
        _flags(plan, inputs, normalize)
        | _heads(shape)
        | _of_cotangents(cotangents, correcting)
        | {"TOGETHER": plan.together, "BLOCK_K": block, "BLOCK_V": summed(shape.V)},
    )


def _warps(plan: Plan) -> int:
    return 8 if plan.chunk >= 64 else 4


def summed(width: int) -> int:
    """Value channels that kernels of gradients take at once."""
    return min(32, padded(width))


def _of_cotangents(cotangents: Cotangents, correcting: bool) -> dict[str, bool]:
    return {"HAS_LATE": cotangents.late[0] is not None, "CORRECTING": correcting}


def solve(plan: Plan, inputs: Inputs, beta: Any, dtypes: tuple) -> Launch:
    """The delta rule within chunks; arrays in the first of ``dtypes``."""
    shape, narrow = plan.shape, dtypes[0]
    per_token = (shape.batch, shape.time, shape.heads)
    return Launch(
        "solve",
        programs(shape.batch * plan.chunks * shape.heads),
        4,
        present((inputs.k, inputs.v, inputs.log_decay, beta, inputs.reset), inputs.k),
        (shape.time,),
        (
            ((shape.batch, plan.chunks, shape.heads, plan.chunk, plan.chunk), narrow),
            ((*per_token, shape.K), narrow),
            ((*per_token, shape.V), narrow),
        ),
        _delta_flags(plan, inputs) | {"K_HEADS": shape.k_heads, "V_HEADS": shape.v_heads}
        | {"BLOCK_K": min(64, _contracted(plan)), "BLOCK_V": min(64 if plan.narrow else 16, padded(shape.V))},
    )  # fmt: skip


def carry_delta(plan: Plan, inputs: Inputs, arrays: tuple, start: Any, dtypes: tuple, *, back: bool) -> Launch:
    """The delta rule through time; ``arrays``: y, w, and local if ``back``, of the kernel."""
    shape, (narrow, wide) = plan.shape, dtypes
    blocks = shape.V // 16 if shape.V % 16 == 0 else 1
    wanted = max(1, FEWEST_PROGRAMS // (shape.batch * shape.heads))  # of blocks
    block = max(16, padded(shape.V) // _power_of_two(min(wanted, blocks)), min(16, padded(shape.V)))
    block = min(block, 32)
    y, w, local = arrays
    x, x_heads = (inputs.q, shape.q_heads) if back else (inputs.k, shape.k_heads)
    per_token, per_state = (shape.batch, shape.time, shape.heads), (shape.heads, shape.K, shape.V)
    return Launch(
        "carry_delta",
        programs(shape.batch * shape.heads * math.ceil(shape.V / block)),
        4,
        present((x, y, w, inputs.k, local, inputs.log_decay, inputs.reset, start), x),
        (shape.time,),
        (
            ((shape.batch, plan.chunks, *per_state), narrow),
            ((shape.batch, *per_state), wide),
            ((*per_token, shape.V), narrow),
        ),
        _delta_flags(plan, inputs)
        | {"BACK": back, "X_HEADS": x_heads, "K_HEADS": shape.k_heads}
        | {"BLOCK_K": padded(shape.K), "BLOCK_V": block},
    )


def corrections(plan: Plan, inputs: Inputs, beta, inverse, u, du, borders, dtypes: tuple) -> Launch:
    """The gradients of v and beta, one for each memory."""
    shape, (narrow, wide) = plan.shape, dtypes
    per_token = (shape.batch, shape.time, shape.heads)
    return Launch(
        "corrections",
        programs(shape.batch * plan.chunks * shape.heads),
        _warps(plan),
        present((inputs.k, inputs.v, inputs.log_decay, beta, inputs.reset, inverse, u, du, borders), inputs.k),
        (shape.time,),
        (((*per_token, shape.V), narrow), (per_token, wide)),
        _delta_flags(plan, inputs) | {"K_HEADS": shape.k_heads, "V_HEADS": shape.v_heads}
        | {"BLOCK_K": _contracted(plan), "BLOCK_V": summed(shape.V)},
    )  # fmt: skip


def _delta_flags(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    return {name: value for name, value in _flags(plan, inputs, False).items() if name != "HAS_SLOPE"}


class Segments(NamedTuple):
    """The sizes of a memory of segments, whose tokens are taken in tiles of a segment's length.

    Attributes:
      tile: tokens of a tile; block: tokens taken at once; parts: of a tile, which programs sum up for themselves.
    """

    shape: Shape
    narrow: bool
    tile: int
    block: int
    parts: int

    @property
    def tiles(self) -> int:
        return math.ceil(self.shape.time / self.tile)


def segments_plan(shape: Shape, narrow: bool, segment: int) -> Segments:
    tile = min(segment, shape.time)
    block = max(16, min(64 if narrow else 32, _power_of_two(tile)))
    count = shape.batch * math.ceil(shape.time / tile) * shape.heads * math.prod(carried_blocks(shape))
    parts = max(1, min(math.ceil(FEWEST_PROGRAMS / count), tile // (4 * block)))
    return Segments(shape, narrow, tile, block, parts)


def segment_sums(plan: Segments, x, y, weight, slope, kind, heads: int, dtype, *, vectors: bool) -> Launch:
    """Sums of two kinds of tokens, in as many parts as the plan says; without y only the vectors.

    x [batch, time, heads of x, K] and y likewise, V, of any numbers of heads that divide or are multiples of heads.
    """
    batch, time, x_heads, K = x.shape
    y_heads, V = (x_heads, 1) if y is None else y.shape[2:]
    lanes = max(heads, x_heads, y_heads)
    block_k, block_v = min(64, padded(K)), min(64, padded(V))
    per_sum = (batch, plan.tiles, 2, plan.parts, heads, K)
    return Launch(
        "segment_sums",
        programs(math.prod(per_sum[:5]) * math.ceil(K / block_k) * math.ceil(V / block_v)),
        4,
        present((x, y, weight, slope, kind), x),
        (time, plan.tile, plan.tiles),
        (
            ((1,), dtype) if y is None else ((*per_sum, V), dtype),
            (per_sum, dtype) if vectors else ((1,), dtype),
        ),
        {
            "HAS_MATRICES": y is not None, "HAS_VECTORS": vectors, "HAS_WEIGHT": weight is not None,
            "HAS_SLOPE": slope is not None, "NARROW": plan.narrow, "C": plan.block, "PARTS": plan.parts,
            "HEADS": heads, "READERS": lanes // heads, "X_HEADS": x_heads, "Y_HEADS": y_heads, "K": K, "V": V,
            "BLOCK_K": block_k, "BLOCK_V": block_v,
        },
    )  # fmt: skip


def segment_reads(
    plan: Segments, x, matrices, vectors, weight, slope, kind, lanes: int, dtypes: tuple, *, divide: bool = False,
    transposed: bool = False,
) -> Launch:  # fmt: skip
    """What tokens find, in the first of ``dtypes``, and denominators in the second, if ``divide``."""
    batch, time, x_heads, width = x.shape
    heads = (vectors if matrices is None else matrices).shape[3]
    if matrices is not None:
        out = matrices.shape[4 if transposed else 5]
    else:
        out = 1 if divide else vectors.shape[4]
    block = min(64 if plan.narrow else 32, padded(out))
    run = max(1, min(4, plan.tile // plan.block))
    runs = math.ceil(plan.tile / (run * plan.block))
    per_token = (batch, time, lanes)
    return Launch(
        "segment_reads",
        programs(batch * plan.tiles * runs * lanes * math.ceil(out / block)),
        4,
        present((x, matrices, vectors, weight, slope, kind), x),
        (time, plan.tile, plan.tiles),
        (
            ((1,), dtypes[0]) if matrices is None and slope is None else ((*per_token, out), dtypes[0]),
            (per_token, dtypes[1]) if divide else ((1,), dtypes[1]),
        ),
        {
            "HAS_MATRICES": matrices is not None, "HAS_WEIGHT": weight is not None, "HAS_SLOPE": slope is not None,
            "DIVIDE": divide, "NARROW": plan.narrow, "C": plan.block, "RUN": run, "HEADS": heads, "LANES": lanes,
            "X_HEADS": x_heads, "WIDTH": width, "OUT": out, "TRANSPOSED": transposed,
            "BLOCK_K": min(padded(width), 128 if plan.narrow else 32), "BLOCK_V": block,
        },
    )  # fmt: skip
