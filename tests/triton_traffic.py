"""What Triton kernels (the selective scan, the convolution) move between memory and programs, by their launches.

Every address that an instruction of a program touches counts once, as in Triton's interpreter, by which
tests/parity checks these counts; caches are left out. Nothing here needs Triton, PyTorch or a GPU.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lcx_kernels.selective_scan import triton_plan
from lcx_kernels.selective_scan.triton_plan import Inputs, Launch, Plan

# Over the least possible, at most; `cut`: where time is cut into segments.
LIMITS = {"forward": 1.35, "forward, cut": 1.8, "backward": 2.2, "backward, cut": 2.2}


@dataclass(frozen=True)
class Abstract:
    """An array that is only a shape and a dtype, as much of one as `triton_plan` asks for."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def reshape(self, *shape: int) -> "Abstract":
        return Abstract(shape, self.dtype)

    def sum(self, axes: int | tuple[int, ...]) -> "Abstract":
        axes = (axes,) if isinstance(axes, int) else axes
        return Abstract(tuple(size for axis, size in enumerate(self.shape) if axis not in axes), self.dtype)


class Pass(NamedTuple):
    """A forward or a backward pass: its launches, and bytes; ``least``: inputs, outputs and kept states, each once."""

    launches: list[Launch]
    moved: int
    least: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def size(*arrays: Any) -> int:
    """Bytes; None has none."""
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in arrays if a is not None)


def summed(outputs: tuple, gradients: Inputs) -> int:
    """What the sums of a backward launch's partial gradients, outside of the kernels, read and write."""
    return size(*outputs[3:8]) + size(gradients.A, gradients.B, gradients.C, gradients.D, gradients.dt_bias)


def abstract_inputs(batch: int, time: int, channels: int, state: int, dtype: Any, with_y: bool = True) -> Inputs:
    """As a model gives them: per token in ``dtype``, the rest in float32 or wider. Without y: of the summary."""
    dtype, wide = np.dtype(dtype), np.dtype(jnp.promote_types(dtype, jnp.float32))
    per_token, shared = Abstract((batch, time, channels), dtype), Abstract((batch, time, state), dtype)
    weight = Abstract((channels,), wide)
    inputs = Inputs(
        x=per_token, dt=per_token, A=Abstract((channels, state), wide), B=shared, C=shared, D=weight, z=per_token,
        dt_bias=weight, initial_state=Abstract((batch, channels, state), wide),
        reset=Abstract((batch, time), np.dtype(np.int8)),
    )  # fmt: skip
    return inputs if with_y else inputs._replace(C=None, D=None, z=None)


def passes(inputs: Inputs, plan: Plan) -> dict[str, Pass]:
    """The passes over these inputs: "forward", "keeping" (forward, and keeps states for the way back), "backward"."""
    found = {}

    def take(name: str, run_pass):
        launches, around = [], [0]

        def run(launch: Launch) -> tuple:
            launches.append(launch)
            return tuple(Abstract(*output) for output in launch.outputs)

        results, least = run_pass(run, around)
        found[name] = Pass(launches, sum(map(moved, launches)) + around[0], least)
        return results

    def forward(keep: bool):
        def run_pass(run, _):
            results = triton_plan.forward(run, inputs, True, plan, keep)
            return results, size(*inputs, *results)

        return run_pass

    def backward(run, around):
        kept = []
        gradients = triton_plan.backward(
            lambda launch: kept.append(run(launch)) or kept[-1], inputs, True, plan, borders, y, final
        )
        around[0] = summed(kept[-1], gradients)
        return gradients, size(*inputs[:8], inputs.reset, borders, y, final, *gradients)

    take("forward", forward(False))
    y, final, borders = take("keeping", forward(True))
    take("backward", backward)
    return found


def moved(launch: Launch) -> int:
    """Bytes that the programs of a launch load and store."""
    return _COUNTS[launch.kernel](launch, _Sizes(launch))


class _Sizes:
    """The numbers of things in a launch, and the bytes of one element of each of its arrays."""

    def __init__(self, launch: Launch):
        constants = launch.constants
        self.state = constants["STATE"]
        block = constants["INNER"] * constants["WARPS"] * 32 // constants["LOW"]
        self.items = [np.dtype(a.dtype).itemsize for a in launch.inputs]
        self.out_items = [np.dtype(dtype).itemsize for _, dtype in launch.outputs]
        if launch.kernel == "combine":
            (channels, self.segments), self.time = launch.scalars, 0
        else:
            self.time, channels, self.segments, _ = launch.scalars
        self.channels, self.blocks = channels, -(-channels // block)
        per_row = self.blocks * (1 if launch.kernel == "combine" else self.segments)
        self.batch = launch.programs // per_row

    @property
    def tokens(self) -> int:
        """A number per channel of every token."""
        return self.batch * self.time * self.channels

    @property
    def shared(self) -> int:
        """A state's numbers for every token, read or written by each block of channels."""
        return self.batch * self.time * self.blocks * self.state

    @property
    def resets(self) -> int:
        return self.batch * self.time * self.blocks

    @property
    def per_segment(self) -> int:
        """A number per channel of every segment."""
        return self.batch * self.segments * self.channels

    @property
    def final(self) -> int:
        return self.batch * self.channels * self.state


def _forward(launch: Launch, n: _Sizes) -> int:
    has, (x, dt, A, B, C, D, z, dt_bias, reset, initial) = launch.constants, n.items
    y, borders, final, dt_sum, kept = n.out_items
    chunks = -(-n.time // has["CHUNK"])
    total = n.per_segment * (n.state * A + D * has["HAS_D"] + dt_bias * has["HAS_BIAS"])
    total += n.tokens * (x + dt + (y + z * has["HAS_Z"]) * has["HAS_C"])
    total += n.shared * (B + C * has["HAS_C"]) + n.resets * reset * has["HAS_RESET"]
    total += n.batch * chunks * n.channels * n.state * borders * has["KEEP"]
    if has["SUMMARY"]:
        return total + n.per_segment * (n.state * final + dt_sum + kept)
    return total + n.per_segment * n.state * initial + n.final * final


def _adjoint(launch: Launch, n: _Sizes) -> int:
    has, (dt, A, C, z, dt_bias, reset, dy), (early, dt_sum, kept) = launch.constants, n.items, n.out_items
    total = n.per_segment * (n.state * A + dt_bias * has["HAS_BIAS"])
    # In a segment's last turn, what is read ahead for the next one is its first body once more.
    length, body, group = launch.scalars[3], has["BODY"], has["GROUP"]
    firsts = range(0, n.time, length)
    tokens = n.time + sum(min(body, n.time - first) for first in firsts)
    rows = n.time + sum(max(0, min(group, n.time - (first + body - group))) for first in firsts)
    total += n.batch * tokens * n.channels * (dt + dy * has["HAS_C"] + z * has["HAS_Z"])
    total += n.batch * n.blocks * (rows * n.state * C * has["HAS_C"] + tokens * reset * has["HAS_RESET"])
    return total + n.per_segment * (n.state * early + dt_sum + kept)


def _combine(launch: Launch, n: _Sizes) -> int:
    (A, edge, ends, dt_sum, kept), (starts, out) = n.items, n.out_items
    return n.final * (A + edge + out) + n.per_segment * (n.state * (ends + starts) + dt_sum + kept)


def _backward(launch: Launch, n: _Sizes) -> int:
    has, (x, dt, A, B, C, D, z, dt_bias, reset, borders, dy, late) = launch.constants, n.items
    dx, ddt, dz, dB, dC, dA, dD, ddt_bias, early = n.out_items
    has_c, resets, chunk = has["HAS_C"], reset * has["HAS_RESET"], has["CHUNK"]
    total = n.per_segment * n.state * (A + late + dA)
    total += n.per_segment * ((D + dD) * has["HAS_D"] + (dt_bias + ddt_bias) * has["HAS_BIAS"])
    total += n.batch * -(-n.time // has["BODY"]) * n.channels * n.state * borders + n.final * early
    # Before a body's tokens all groups from its chunk's border to its last group are gone through, to find its states.
    bodies = range(0, n.time, has["BODY"])
    again = sum(min(start + has["BODY"] - has["GROUP"], n.time) - start // chunk * chunk for start in bodies)
    both = n.tokens * (x + dt) + n.shared * B + n.resets * resets
    total += both + both * again // n.time
    total += n.tokens * (dx + ddt + dy * has_c + (z + dz) * has["HAS_Z"])
    return total + n.shared * (dB + (C + dC) * has_c)


_COUNTS = {"forward": _forward, "adjoint": _adjoint, "combine": _combine, "backward": _backward}


def moved_by_convolution(launch: Any) -> int:
    """Bytes that the programs of a launch of `causal_conv` load and store."""
    has = launch.constants
    (time, segments), width, channels = launch.scalars, has["WIDTH"], has["CHANNELS"]
    blocks = -(-channels // has["BLOCK"])
    batch, held = launch.programs // blocks // segments, width - 1
    x, tail, weight, bias, lookback, *rest = [np.dtype(array.dtype).itemsize for array in launch.inputs]
    out = [np.dtype(dtype).itemsize for _, dtype in launch.outputs]
    total = segments * (width * weight + bias) + held * tail  # for each channel of a row
    limits = 0
    for first in range(0, time, has["LENGTH"]):
        own = min(first + has["LENGTH"], time) - first
        before = min(first, held)
        if launch.kernel == "forward":
            total += (before + own) * x + own * out[0]
            limits += own
            continue
        beyond = first + -(-(has["LENGTH"] + held) // has["GROUP"]) * has["GROUP"]
        total += (before + min(beyond, time) - first) * x
        total += (min(first + own + held, time) - first) * rest[0] + own * out[0] + (width + 1) * out[2]
        limits += min(beyond, time) - first
    total += held * out[1] if launch.kernel == "backward" else 0
    return batch * (total * channels + limits * blocks * lookback * has["LIMITED"])
