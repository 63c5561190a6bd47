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

# What an H100's 132 multiprocessors hold at once: programs of the forward kernel, which is four warps, 16 numbers of a
# state in a thread, and warps of the backward kernel.
WANTED_PROGRAMS, BACKWARD_WARPS = 132 * 3, 132 * 8
# Tokens that a segment should have at least: each costs a state written and read a few times.
SHORTEST_SEGMENT = 256
LARGEST_STATE = 128


class Tile(NamedTuple):
    """How a program's threads share its channels and their states, see `triton_kernels`.

    Attributes:
      per: numbers of a channel's state in a thread; low: threads that share a channel.
      inner: channels of a thread; warps: of a program.
      body: tokens of a pass through a loop, unrolled; group: those of which B and C are loaded together, a divisor.
    """

    per: int
    low: int
    inner: int
    warps: int
    body: int
    group: int

    @property
    def block(self) -> int:
        """Channels of a program."""
        return self.inner * self.warps * 32 // self.low

    @property
    def constants(self) -> dict[str, int]:
        return {"PER": self.per, "LOW": self.low, "INNER": self.inner, "WARPS": self.warps}


class Cut(NamedTuple):
    """Pieces of time, and tokens of each but the last, a multiple of the chunk."""

    segments: int
    length: int


class Plan(NamedTuple):
    """The launches' sizes.

    Attributes:
      forward, backward: tiles of the kernels; `adjoint` and `combine` use that of the forward kernel.
      chunk: tokens between two kept states, a multiple of either tile's body.
      segments, length: how the forward pass cuts time, as of `Cut`; back: how the backward pass does.
    """

    forward: Tile
    backward: Tile
    chunk: int
    segments: int
    length: int
    back: Cut


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


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _cuts(time: int, chunk: int, most: int) -> list[Cut]:
    """Into up to ``most`` segments, none shorter than it should be."""
    lengths = {
        math.ceil(time / each / chunk) * chunk for each in range(1, max(1, min(most, time // SHORTEST_SEGMENT)) + 1)
    }
    return [Cut(math.ceil(time / length), length) for length in sorted(lengths, reverse=True)]


def _cost(programs: int, room: int, cut: Cut, least: float, again: float) -> float:
    """Of a pass, in the time that a token takes where a GPU is full, by a model that fits what an H100 measures.

    ``room``: programs that a GPU holds at once; more wait for the next wave. ``least``: of that time what a token takes
    where next to none run. ``again``: what the first pass over a cut time adds. A segment's states cost 16 tokens.
    """
    filled = programs * cut.segments / room
    cost = math.ceil(filled) * (cut.length + 16) * (least + (1 - least) * min(1, filled))
    return cost * (1 + again) if cut.segments > 1 else cost


def _plan_forward(batch: int, time: int, channels: int, tiles: list[Tile], chunk: int) -> tuple[Tile, Cut]:
    """The tile and cut that cost least: of tiles, first the one whose threads hold most, of which fewest run.

    Others are for whole rows: more programs share B and C then, of which a cut reads twice as much.
    """
    found = []
    for place, tile in enumerate(tiles):
        programs = batch * math.ceil(channels / tile.block)
        room = WANTED_PROGRAMS * (3 + place) // 3
        for cut in _cuts(time, chunk, math.ceil(8 * room / programs) if place == 0 else 1):
            found.append((0.75**place * _cost(programs, room, cut, 0.6, 0.86), place, cut))
    _, place, cut = min(found)
    return tiles[place], cut


def make_plan(batch: int, time: int, channels: int, state: int, wide: bool, chunk_size: int | None) -> Plan:
    """The sizes by shape.

    A thread of the forward kernel holds up to 16 numbers of the state of one channel: what is per channel is computed
    once then, and sums over the state are within a thread. Where channels are too few for that, it holds 8. One of the
    backward kernel holds 8 numbers of two channels: it also sums over channels, between threads, and keeps the states
    of a group of tokens. ``wide``: the arithmetic is in float64, whose numbers take two registers: a thread holds 4.
    ``chunk_size`` is an upper limit.
    """
    padded = _power_of_two(state)
    chunk = min(8, 1 << ((chunk_size or 8).bit_length() - 1))
    body, group = min(4, chunk), min(2, chunk)
    tiles = [
        Tile(per, padded // per, inner=1, warps=4, body=body, group=group)
        for per in ((4,) if wide else (16, 8))
        if per <= padded
    ] or [Tile(padded, 1, inner=1, warps=4, body=body, group=group)]
    forward, cut = _plan_forward(batch, time, channels, tiles, chunk)
    per, inner = (min(padded, 4), 1) if wide else (min(padded, 8), 2)
    low = padded // per
    backward = Tile(per, low, inner, warps=min(8, max(1, 2 * low // inner)), body=min(2 * group, chunk), group=group)
    programs, room = batch * math.ceil(channels / backward.block), BACKWARD_WARPS // backward.warps
    cuts = _cuts(time, chunk, math.ceil(8 * room / programs))
    back = min(cuts, key=lambda cut: _cost(programs, room, cut, 0.8, 0.15))
    return Plan(forward, backward, chunk, *cut, back)


def _backward_tile(inputs: Inputs, plan: Plan) -> Tile:
    """Rows of B and C in float32 take twice the registers of bfloat16: then a thread has one channel.

    Without y, the compiler has each thread make do with fewer registers than there are: then one token at a time.
    """
    tile = plan.backward
    if inputs.B.dtype.itemsize == 2:
        return tile
    group = tile.group if inputs.C is not None else 1
    return tile._replace(inner=1, warps=min(8, tile.inner * tile.warps), group=group)


def _programs(plan: Plan, tile: Tile, batch: int, channels: int, segments: int | None = None) -> int:
    programs = batch * (segments or plan.segments) * math.ceil(channels / tile.block)
    if programs >= 2**31:
        raise ValueError(f"batch: {batch} rows of {channels} channels need {programs} programs, more than a grid has")
    return programs


def _layout(inputs: Inputs, tile: Tile) -> dict[str, Any]:
    """The constants of a tile for these inputs."""
    _, time, channels, state = inputs.sizes
    even = time % tile.body == 0 and channels % tile.block == 0 and state == tile.per * tile.low
    pack = math.gcd(4, math.gcd(state, tile.per))
    return tile.constants | {"EVEN": even, "PACK": pack, "BODY": tile.body, "GROUP": tile.group}


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
        _programs(plan, plan.forward, batch, channels, segments),
        plan.forward.warps,
        _present(arrays, inputs.x),
        (time, channels, segments, plan.length),
        outputs,
        {"SUMMARY": summary, "KEEP": keep, "CHUNK": plan.chunk, "STATE": state} | flags | _layout(inputs, plan.forward),
    )


def _combine_launch(inputs: Inputs, plan: Plan, edge: Any, summaries: tuple, back: bool, dtype: Any) -> Launch:
    batch, _, channels, state = inputs.sizes
    segments = plan.back.segments if back else plan.segments
    return Launch(
        "combine",
        _programs(plan, plan.forward, batch, channels, 1),
        plan.forward.warps,
        (inputs.A, edge, *summaries),
        (channels, segments),
        (((batch, segments, channels, state), dtype), ((batch, channels, state), dtype)),
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
    segments, length = plan.back
    scalars = (time, channels, segments, length)
    late = d_final.reshape(batch, 1, channels, state)
    if segments > 1:
        late = _late(run, inputs, plan, flags, dy, d_final)
    tile = _backward_tile(inputs, plan)
    blocks, nothing = math.ceil(channels / tile.block), ((1,), dtype)
    per_token = ((batch, time, channels), inputs.x.dtype)
    shared, per_channel = ((blocks, batch, time, state), dtype), ((batch, segments, channels), dtype)
    outputs = (
        per_token,
        ((batch, time, channels), inputs.dt.dtype),
        ((batch, time, channels), inputs.z.dtype) if flags["HAS_Z"] else nothing,
        shared,
        shared if flags["HAS_C"] else nothing,
        ((batch, segments, channels, state), dtype),
        per_channel if flags["HAS_D"] else nothing,
        per_channel if flags["HAS_BIAS"] else nothing,
        ((batch, channels, state), dtype),
    )
    arrays = _present((*inputs[:8], inputs.reset, borders, dy, late), inputs.x)
    constants = {"CHUNK": plan.chunk, "STATE": state} | flags | _layout(inputs, tile)
    programs = _programs(plan, tile, batch, channels, segments)
    dx, ddt, dz, dB, dC, dA, dD, ddt_bias, early = run(
        Launch("backward", programs, tile.warps, arrays, scalars, outputs, constants)
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
    dtype, (segments, length) = d_final.dtype, plan.back
    arrays = (inputs.dt, inputs.A, inputs.C, inputs.z, inputs.dt_bias, inputs.reset, dy)
    per_segment = ((batch, segments, channels), dtype)
    constants = {"STATE": state} | _layout(inputs, plan.forward)
    summaries = run(
        Launch(
            "adjoint",
            _programs(plan, plan.forward, batch, channels, segments),
            plan.forward.warps,
            _present(arrays, inputs.dt),
            (time, channels, segments, length),
            (((batch, segments, channels, state), dtype), per_segment, per_segment),
            constants | _pick(flags, "SOFTPLUS", "HAS_C", "HAS_Z", "HAS_BIAS", "HAS_RESET"),
        )
    )
    late, _ = run(_combine_launch(inputs, plan, d_final, tuple(summaries), True, dtype))
    return late
