"""Chips and how they are joined: one table of published rates, and the hardware that a text like "v5p:4x4x4" names.

Rates are peaks: bytes and FLOPs a second of one chip, an H100 being one chip. What is published of links counts both
directions together; here it is one direction, which is what a chip can send.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lcx.errors import UserError, suggest

Platform = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      matrix: FLOP/s of the matrix units by dtype of what is multiplied, dense.
      vector: FLOP/s of the vector units in float32.
      memory: bytes that a program can have; memory_rate: bytes/s of it.
      link: bytes/s that a chip sends along one axis of a torus, both ways round together; or to the chips of its node.
      network: bytes/s that it sends to other nodes.
    """

    kinds: tuple[str, ...]  # as JAX names it: `device_kind`
    platform: Platform
    matrix: Mapping[str, float]
    vector: float
    memory: float
    memory_rate: float
    link: float
    network: float


# TPU: "System architecture" on the pages of Cloud TPU's documentation for v5e, v5p and v6e: matrix units in bfloat16,
# which is also what float32 is multiplied in at JAX's default precision; HBM; bidirectional ICI of 400, 1200 and 800
# GB/s a chip over 4, 6 and 4 ports, of which one axis has two; network of a host over its chips. Of 16, 95 and 32 GiB a
# program gets what libtpu leaves, and the compiler refuses what does not fit. Vector units are not published as a rate:
# 8 x 128 lanes of 4 units a core, by the clock that the matrix rate implies (1.5 GHz, and 1.75 for v5p and v6e).
# GPU: NVIDIA's data sheets of H100 SXM and H200 SXM: dense rates, half of what is given with sparsity; float32 is
# multiplied as TF32; NVLink of 900 GB/s both ways; a 400 Gb/s adapter a GPU, as in a DGX H100.
GIB, HOPPER = 2**30, {"bfloat16": 989.4e12, "float32": 494.7e12}
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        kinds=("TPU v5 lite", "TPU v5e"),
        platform="tpu",
        matrix={"bfloat16": 197e12, "float32": 197e12},
        vector=8 * 128 * 4 * 1.5e9,
        memory=15.75 * GIB,
        memory_rate=819e9,
        link=100e9,
        network=25e9 / 8,
    ),
    "v5p": Chip(
        kinds=("TPU v5", "TPU v5p"),
        platform="tpu",
        matrix={"bfloat16": 459e12, "float32": 459e12},
        vector=2 * 8 * 128 * 4 * 1.75e9,
        memory=95 * GIB,
        memory_rate=2765e9,
        link=200e9,
        network=50e9 / 8,
    ),
    "v6e": Chip(
        kinds=("TPU v6 lite", "TPU v6e"),
        platform="tpu",
        matrix={"bfloat16": 918e12, "float32": 918e12},
        vector=8 * 128 * 4 * 1.75e9,
        memory=31.25 * GIB,
        memory_rate=1640e9,
        link=200e9,
        network=100e9 / 8,
    ),
    "h100": Chip(
        kinds=("NVIDIA H100 80GB HBM3",),
        platform="gpu",
        matrix=HOPPER,
        vector=66.9e12,
        memory=0.92 * 84_929_347_584,  # the share that launch/xla_flags.sh gives to JAX
        memory_rate=3352e9,
        link=450e9,
        network=50e9,
    ),
    "h200": Chip(
        kinds=("NVIDIA H200",),
        platform="gpu",
        matrix=HOPPER,
        vector=66.9e12,
        memory=0.92 * 150_754_820_096,
        memory_rate=4800e9,
        link=450e9,
        network=50e9,
    ),
}
CPU = "cpu"
GPUS_PER_NODE = 8
MOST_NODES, MOST_CPU_DEVICES = 1024, 64
# The slices that can be had: of the tori in two dimensions all; of v5p's, all below a cube of 4 x 4 x 4.
FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_V5P, LARGEST_V5P = ("2x2x1", "2x2x2", "2x2x4", "2x4x4"), 6144


@dataclass(frozen=True)
class Hardware:
    """Some chips of one kind.

    Attributes:
      name: as it was asked for.
      kind: a key of CHIPS, or "cpu".
      shape: chips along each dimension of a torus; (nodes, GPUs of each); (devices,) of a CPU.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip | None:
        """None for a CPU, of which nothing is known."""
        return CHIPS.get(self.kind)

    @property
    def platform(self) -> Platform:
        return self.chip.platform if self.chip else "cpu"

    @property
    def memory(self) -> float:
        """Bytes that a device can have; CPU devices share those of the machine."""
        if self.chip:
            return self.chip.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.devices

    def crosses_nodes(self, devices: list[int]) -> bool:
        """Whether these devices, counted through the mesh, lie on several nodes of GPUs."""
        return self.platform == "gpu" and len({device // self.shape[1] for device in devices}) > 1


def parse_hardware(text: str) -> Hardware:
    """The hardware of a text: "v5p:4x4x4", "h100:8", "h100:8x16" (8 GPUs on each of 16 nodes), "cpu:8".

    Raises UserError for a kind that is not in the table and for a topology that does not exist.
    """
    kind, _, topology = text.partition(":")
    if kind != CPU and kind not in CHIPS:
        raise UserError(f'--hardware: unknown kind "{kind}": {suggest(kind, [*CHIPS, CPU])}')
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", topology):
        raise UserError(f"--hardware={text}: write the kind and its topology, like {_EXAMPLES[_platform(kind)]}.")
    shape = tuple(map(int, topology.split("x")))
    problem = _problem(kind, topology, shape)
    if problem:
        raise UserError(f"--hardware={text}: {problem}.")
    if _platform(kind) == "gpu":
        shape = (shape[1] if len(shape) > 1 else 1, shape[0])
    return Hardware(text, kind, shape)


_EXAMPLES = {"tpu": "v5e:4x4 or v5p:4x4x4", "gpu": "h100:8, or h100:8x16 for sixteen nodes of eight", "cpu": "cpu:8"}


def _platform(kind: str) -> Platform:
    return CHIPS[kind].platform if kind in CHIPS else "cpu"


def _problem(kind: str, topology: str, shape: tuple[int, ...]) -> str | None:
    """Why there is no such topology."""
    if kind == CPU:
        fits = len(shape) == 1 and shape[0] <= MOST_CPU_DEVICES
        return None if fits else f"a CPU plays 1 to {MOST_CPU_DEVICES} devices"
    if _platform(kind) == "gpu":
        if len(shape) > 2 or shape[0] > GPUS_PER_NODE or (len(shape) == 2 and shape[1] > MOST_NODES):
            return f"a node has 1 to {GPUS_PER_NODE} GPUs, and there are 1 to {MOST_NODES} nodes: {kind}:8x16"
        return None
    if kind == "v5p":
        cubes = len(shape) == 3 and not any(size % 4 for size in shape) and list(shape) == sorted(shape)
        if topology in SMALL_V5P or (cubes and math.prod(shape) <= LARGEST_V5P):
            return None
        return f"a v5p slice is {', '.join(SMALL_V5P)} or multiples of 4 in ascending order, up to 16x16x24"
    return None if topology in FLAT_SLICES else f"a {kind} slice is one of {', '.join(FLAT_SLICES)}"


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of the matrix units of the device that JAX calls so; None where no peak is published for the dtype."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip.matrix.get(dtype)
    return None
