"""How the selective scan's Triton kernels are launched: block sizes by shape, grids, arguments in order, reductions.

Nothing here needs Triton, JAX or a GPU. `forward` and `backward` hand each launch to a function that runs it, so that
the tests run exactly these launches in Triton's interpreter. Where the rows and blocks of channels are too few to
fill a GPU, time is cut into segments: a first pass finds where each segment gets from zero, a small kernel composes
these, a second pass scans every segment from the right state; the backward pass likewise, with the gradient of the
state, from the end.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

# Programs below which time is cut, and how many are then wanted: 2 and 4 for each of an H100's 132 multiprocessors.
FEWEST_PROGRAMS = 264
WANTED_PROGRAMS = 528
# Tokens that a segment should have at least: each costs a state written and read a few times.
SHORTEST_SEGMENT = 256
LARGEST_STATE = 128


class Tile(NamedTuple):
    """The five axes of a program's tiles, see `triton_kernels`."""

    high: int
    inner: int
    warps: int
    low: int
    outer: int

    @property
    def block(self) -> int:
        """Channels of a program."""
        return self.inner * self.warps * self.outer

    @property
    def constants(self) -> dict[str, int]:
        return {name.upper(): size for name, size in self._asdict().items()}


class Plan(NamedTuple):
    """The launches' sizes.

    Attributes:
      forward, backward: tiles of the kernels; `adjoint` and `combine` use that of the forward kernel.
      chunk: tokens between two kept states; group: tokens that are unrolled, a divisor of it.
      segments: pieces of time; length: tokens of each but the last, a multiple of the chunk.
    """

    forward: Tile
    backward: Tile
    chunk: int
    group: int
    segments: int
    length: int


class Launch(NamedTuple):
    """One kernel launch. The kernel's parameters are inputs, scalars and outputs, in this order, then the constants."""

    kernel: str
    programs: int
    warps: int
    inputs: tuple[Any, ...]
    scalars: tuple[int, ...]
    outputs: tuple[tuple[tuple[int, ...], Any], ...]  # shape and dtype of each
    constants: dict[str, int]


class Inputs(NamedTuple):
    """Arrays as of `Arguments`, in its order; None where absent. reset is int8."""

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    dt_bias: Any
    initial_state: Any
    reset: Any

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """batch, time, channels, state"""
        return (*self.x.shape, self.A.shape[1])


def _tile(state: int, low: int, inner: int, block: int) -> Tile:
    """LOW lanes share a channel's state, and warps are added up to ``block`` channels a program, or 8 warps."""
    padded = _power_of_two(state)
    low = min(low, padded, 16)
    outer = 32 // low
    return Tile(padded // low, inner, min(8, max(1, block // (inner * outer))), low, outer)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def make_plan(batch: int, time: int, channels: int, state: int, wide: bool, chunk_size: int | None) -> Plan:
    """The sizes by shape.

    A thread of the forward kernel holds up to 16 numbers of the state: sums over the state are its only exchange, so
    few lanes share a channel. One of the backward kernel holds up to 8, of more lanes, since it also sums over channels
    and keeps two groups' worth of states. ``wide``: the arithmetic is in float64, whose numbers take two registers.
    ``chunk_size`` is an upper limit.
    """
    padded = _power_of_two(state)
    forward = _tile(state, low=max(2, padded // 8), inner=2, block=128)
    backward = _tile(state, low=max(4, padded // 4), inner=1 if wide or padded > 64 else 2, block=64)
    chunk = min(chunk_size or 16, 8 if wide else 16)
    programs = batch * math.ceil(channels / forward.block)
    segments = 1
    if programs < FEWEST_PROGRAMS:
        segments = max(1, min(math.ceil(WANTED_PROGRAMS / programs), time // SHORTEST_SEGMENT))
    length = math.ceil(time / segments / chunk) * chunk
    return Plan(forward, backward, chunk, 2 - chunk % 2, math.ceil(time / length), length)


def _programs(plan: Plan, tile: Tile, batch: int, channels: int, segments: int | None = None) -> int:
    programs = batch * (segments or plan.segments) * math.ceil(channels / tile.block)
    if programs >= 2**31:
        raise ValueError(f"batch: {batch} rows of {channels} channels need {programs} programs, more than a grid has")
    return programs


def _flags(inputs: Inputs, dt_softplus: bool) -> dict[str, bool]:
    return {
        "SOFTPLUS": dt_softplus,
        "HAS_C": inputs.C is not None,
        "HAS_D": inputs.D is not None and inputs.C is not None,
        "HAS_Z": inputs.z is not None and inputs.C is not None,
        "HAS_BIAS": inputs.dt_bias is not None,
        "HAS_RESET": inputs.reset is not None,
    }


def _pick(flags: dict[str, bool], *names: str) -> dict[str, bool]:
    return {name: flags[name] for name in names}


def _present(arrays: tuple, placeholder: Any) -> tuple:
    """Kernels take an array for each pointer; one that is absent is not touched."""
    return tuple(placeholder if array is None else array for array in arrays)


def _forward_launch(inputs, dt_softplus, plan, dtype, summary: bool, keep: bool, initial) -> Launch:
    batch, time, channels, state = inputs.sizes
    segments, nothing = plan.segments, ((1,), dtype)
    chunks = math.ceil(time / plan.chunk)
    flags = _flags(inputs, dt_softplus)
    if summary:
        flags |= {"HAS_C": False, "HAS_D": False, "HAS_Z": False}
    per_segment = ((batch, segments, channels), dtype)
    outputs = (
        ((batch, time, channels), inputs.x.dtype) if flags["HAS_C"] else nothing,
        ((batch, chunks, state, channels), dtype) if keep else nothing,
        ((batch, segments, channels, state) if summary else (batch, channels, state), dtype),
        per_segment if summary else nothing,
        per_segment if summary else nothing,
    )
    arrays = (*inputs[:8], inputs.reset, initial)
    return Launch(
        "forward",
        _programs(plan, plan.forward, batch, channels),
        plan.forward.warps,
        _present(arrays, inputs.x),
        (time, channels, segments, plan.length),
        outputs,
        {"SUMMARY": summary, "KEEP": keep, "CHUNK": plan.chunk, "GROUP": plan.group, "STATE": state}
        | flags
        | plan.forward.constants,
    )


def _combine_launch(inputs: Inputs, plan: Plan, edge: Any, summaries: tuple, back: bool, dtype: Any) -> Launch:
    batch, _, channels, state = inputs.sizes
    return Launch(
        "combine",
        _programs(plan, plan.forward, batch, channels, segments=1),
        plan.forward.warps,
        (inputs.A, edge, *summaries),
        (channels, plan.segments),
        (((batch, plan.segments, channels, state), dtype), ((batch, channels, state), dtype)),
        {"BACK": back, "STATE": state} | plan.forward.constants,
    )


def forward(run: Callable[[Launch], tuple], inputs: Inputs, dt_softplus: bool, plan: Plan, keep: bool) -> tuple:
    """(y or None, final state, borders or None), the borders if ``keep``.

    Args: run, from a launch to its output arrays.
    """
    batch, _, channels, state = inputs.sizes
    dtype = inputs.initial_state.dtype
    initial = inputs.initial_state.reshape(batch, 1, channels, state)
    if plan.segments > 1:
        _, _, *summaries = run(_forward_launch(inputs, dt_softplus, plan, dtype, True, False, None))
        initial, final = run(_combine_launch(inputs, plan, inputs.initial_state, tuple(summaries), False, dtype))
        if inputs.C is None and not keep:
            return None, final, None
    y, borders, final, _, _ = run(_forward_launch(inputs, dt_softplus, plan, dtype, False, keep, initial))
    return None if inputs.C is None else y, final, borders if keep else None


def backward(
    run: Callable[[Launch], tuple], inputs: Inputs, dt_softplus: bool, plan: Plan, borders: Any, dy: Any, d_final: Any
) -> Inputs:
    """Gradients of all inputs, None where an input is or has none; those that were summed are in the states' dtype."""
    batch, time, channels, state = inputs.sizes
    dtype, flags = d_final.dtype, _flags(inputs, dt_softplus)
    scalars = (time, channels, plan.segments, plan.length)
    late = d_final.reshape(batch, 1, channels, state)
    if plan.segments > 1:
        late = _late(run, inputs, plan, flags, dy, d_final)
    blocks, nothing = math.ceil(channels / plan.backward.block), ((1,), dtype)
    per_token = ((batch, time, channels), inputs.x.dtype)
    shared, per_channel = ((blocks, batch, time, state), dtype), ((batch, plan.segments, channels), dtype)
    outputs = (
        per_token,
        ((batch, time, channels), inputs.dt.dtype),
        ((batch, time, channels), inputs.z.dtype) if flags["HAS_Z"] else nothing,
        shared,
        shared if flags["HAS_C"] else nothing,
        ((batch, plan.segments, channels, state), dtype),
        per_channel if flags["HAS_D"] else nothing,
        per_channel if flags["HAS_BIAS"] else nothing,
        ((batch, channels, state), dtype),
    )
    arrays = _present((*inputs[:8], inputs.reset, borders, dy, late), inputs.x)
    constants = {"CHUNK": plan.chunk, "GROUP": plan.group, "STATE": state} | flags | plan.backward.constants
    programs = _programs(plan, plan.backward, batch, channels)
    dx, ddt, dz, dB, dC, dA, dD, ddt_bias, early = run(
        Launch("backward", programs, plan.backward.warps, arrays, scalars, outputs, constants)
    )
    return Inputs(
        x=dx,
        dt=ddt,
        A=dA.sum((0, 1)),
        B=dB.sum(0),
        C=dC.sum(0) if flags["HAS_C"] else None,
        D=dD.sum((0, 1)) if flags["HAS_D"] else None,
        z=dz if flags["HAS_Z"] else None,
        dt_bias=ddt_bias.sum((0, 1)) if flags["HAS_BIAS"] else None,
        initial_state=early,
        reset=None,
    )


def _late(run, inputs: Inputs, plan: Plan, flags: dict[str, bool], dy: Any, d_final: Any) -> Any:
    """The gradients of the states after each segment, [batch, segments, channels, state]."""
    batch, time, channels, state = inputs.sizes
    dtype, segments = d_final.dtype, plan.segments
    arrays = (inputs.dt, inputs.A, inputs.C, inputs.z, inputs.dt_bias, inputs.reset, dy)
    per_segment = ((batch, segments, channels), dtype)
    constants = {"GROUP": plan.group, "STATE": state} | plan.forward.constants
    summaries = run(
        Launch(
            "adjoint",
            _programs(plan, plan.forward, batch, channels),
            plan.forward.warps,
            _present(arrays, inputs.dt),
            (time, channels, segments, plan.length),
            (((batch, segments, channels, state), dtype), per_segment, per_segment),
            constants | _pick(flags, "SOFTPLUS", "HAS_C", "HAS_Z", "HAS_BIAS", "HAS_RESET"),
        )
    )
    late, _ = run(_combine_launch(inputs, plan, d_final, tuple(summaries), True, dtype))
    return late
