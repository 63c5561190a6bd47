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


def _padded(width: int) -> int:
    """A power of two that tensor cores take."""
    return max(16, _power_of_two(width))


def make_plan(shape: Shape, narrow: bool, chunk_size: int) -> Plan:
    """The sizes by shape; ``chunk_size`` is an upper limit, down to 16."""
    largest = 64 if narrow else 32
    chunk = max(16, min(largest, _power_of_two(chunk_size + 1) // 2, _power_of_two(shape.time)))
    programs = shape.batch * shape.heads * math.prod(_carried_blocks(shape))
    spans = 1
    if programs < FEWEST_PROGRAMS:
        spans = max(1, min(math.ceil(WANTED_PROGRAMS / programs), shape.time // (SHORTEST_SPAN * chunk)))
    length = math.ceil(shape.time / spans / chunk) * chunk
    together = sharing = shape.lanes // max(shape.q_heads, shape.k_heads)
    chunks = shape.batch * math.ceil(shape.time / chunk)
    while together > 1 and (sharing % together or chunks * shape.lanes // together < FEWEST_PROGRAMS):
        together -= 1
    return Plan(shape, narrow, chunk, math.ceil(shape.time / length), length, together)


def _programs(number: int) -> int:
    if number >= 2**31:
        raise ValueError(f"batch: {number} programs are needed, more than a grid has")
    return number


def _contracted(plan: Plan) -> int:
    """Key channels that a product sums over at once: registers hold operands of float32."""
    return min(_padded(plan.shape.K), 128 if plan.narrow else 32)


def _carried_blocks(shape: Shape) -> tuple[int, int]:
    return math.ceil(shape.K / min(64, _padded(shape.K))), math.ceil(shape.V / min(64, _padded(shape.V)))


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


def _present(arrays: tuple, placeholder: Any) -> tuple:
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
        "BLOCK_K": min(64, _padded(shape.K)), "BLOCK_V": min(64, _padded(shape.V)),
    }  # fmt: skip
    return Launch(
        "carry",
        _programs(math.prod(per_span) * math.prod(_carried_blocks(shape))),
        4,
        _present((x, y, inputs.log_decay, inputs.reset, *weights, *start), x),
        (shape.time, plan.length, plan.spans),
        outputs,
        constants | _flags(plan, inputs, normalize),
    )


def outputs(plan: Plan, inputs: Inputs, normalize: bool, borders: tuple, dtypes: tuple) -> Launch:
    """What is read, in the first of ``dtypes``, and the denominators, in the second."""
    shape = plan.shape
    block = min(64, _padded(shape.V))
    per_token = (shape.batch, shape.time, shape.lanes)
    out, wide = dtypes
    return Launch(
        "outputs",
        _programs(shape.batch * plan.chunks * shape.lanes * math.ceil(shape.V / block)),
        4,
        _present((*inputs, *borders), inputs.k),
        (shape.time,),
        (((*per_token, shape.V), out), (per_token, wide) if normalize else ((1,), wide)),
        _flags(plan, inputs, normalize) | _heads(shape) | {"BLOCK_K": _contracted(plan), "BLOCK_V": block},
    )


def gradients(
    plan: Plan, inputs: Inputs, normalize: bool, dy: Any, weights: tuple, borders: tuple, late: tuple, dtype: Any
) -> tuple[Launch, Launch]:
    """The gradients of v and log_decay, and those of q and k, of as many heads as the kernels say.

    In the arrays' dtypes where none is left to be added up, else in ``dtype``.
    """
    shape = plan.shape
    groups, nothing = shape.lanes // plan.together, ((1,), dtype)
    arrays = _present((*inputs, dy, *weights, *borders, *late), inputs.k)
    constants = _flags(plan, inputs, normalize) | _heads(shape)
    constants |= {"HAS_LATE": True, "CORRECTING": False, "BLOCK_V": min(32, _padded(shape.V))}
    warps = 8 if plan.chunk >= 64 else 4

    def gradient(array, heads: int, written: int, *width: int) -> tuple:
        return (shape.batch, shape.time, written, *width), array.dtype if heads == written else dtype

    values = Launch(
        "value_gradients",
        _programs(shape.batch * plan.chunks * shape.lanes),
        warps,
        arrays,
        (shape.time,),
        (
            gradient(inputs.v, shape.v_heads, shape.lanes, shape.V),
            nothing if inputs.log_decay is None else gradient(inputs.log_decay, shape.heads, shape.lanes),
        ),
        constants | {"OF_VALUES": True, "OF_DECAY": inputs.log_decay is not None, "BLOCK_K": _contracted(plan)},
    )
    block = min(64, _padded(shape.K))
    keys = Launch(
        "key_gradients",
        _programs(shape.batch * plan.chunks * groups * math.ceil(shape.K / block)),
        warps,
        arrays,
        (shape.time,),
        (gradient(inputs.q, shape.q_heads, groups, shape.K), gradient(inputs.k, shape.k_heads, groups, shape.K)),
        constants | {"TOGETHER": plan.together, "BLOCK_K": block},
    )
    return values, keys
