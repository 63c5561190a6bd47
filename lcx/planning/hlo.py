"""Reading a compiled program: XLA's text as computations of instructions, with sizes, loops' lengths and groups."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_TRIPS = re.compile(r'known_trip_count"?\s*:\s*\{"?n"?\s*:\s*"?(\d+)')
_ORDER = r"(\[[\d,]+\](?:T\([\d,]+\))?|[\d,]+)"  # of devices: see `_order`
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # a memory space that is not the device's main memory
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * _width(self.dtype)


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Its result, a tuple's elements in order."""
        return tuple(
            Array(dtype, tuple(map(int, sizes.split(","))) if sizes else (), not _ELSEWHERE.search(layout))
            for dtype, sizes, layout in _SHAPE.findall(self.shape)
        )

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def scope(self) -> str:
        """The path of names under which it was traced; empty for what the compiler made up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def collective(self) -> str | None:
        """Which of COLLECTIVES it is, or begins."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    def called(self, role: str) -> str | None:
        """The computation in a role: "calls", "body", "condition", "to_apply"."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Program:
    """A compiled program of one device: its computations by name, and the one that it begins with."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def instructions(self, computation: str | None) -> Iterator[Instruction]:
        return iter(self.computations.get(computation or "", {}).values())

    def root(self, computation: str | None) -> Instruction | None:
        return next((one for one in self.instructions(computation) if one.is_root), None)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs: as XLA says, or by the one integer that its condition compares with."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        limits = set(self._integers(loop.called("condition")))
        return limits.pop() if len(limits) == 1 else None

    def _integers(self, computation: str | None) -> Iterator[int]:
        for one in self.instructions(computation):
            if one.opcode == "constant" and re.fullmatch(r"\d+", one.inside):
                yield int(one.inside)
            yield from self._integers(one.called("calls"))

    def stacked(self, loop: Instruction) -> float:
        """Bytes of the arrays that a loop fills, one slice a turn, and hands on."""
        trips, root = self.trips(loop), self.root(loop.called("body"))
        if trips is None or root is None:
            return 0
        body = self.computations[loop.called("body") or ""]
        total = 0.0
        for index, (array, operand) in enumerate(zip(loop.arrays, root.operands, strict=False)):
            source = body.get(operand)
            handed = (
                source is not None
                and source.opcode == "get-tuple-element"
                and f"index={index}" in (source.attributes.split(", ")[0])
            )
            if not handed and array.shape[:1] == (trips,):
                total += array.bytes
        return total


def read_program(text: str) -> Program:
    """The program that `jax.stages.Compiled.as_text` prints."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, pending = "", None, ""
    for line in [*text.splitlines(), "}"]:
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
            continue
        begins = _NAME.match(line)
        if pending and (begins or line == "}"):
            one = _instruction(pending)
            current[one.name] = one
            pending = ""
        if line == "}":
            current = None
        else:
            pending = line if begins else pending + line  # a kernel's own attributes may be written on several lines
    return Program(computations, entry)


def groups_of(one: Instruction, devices: int) -> list[list[int]]:
    """Groups of devices that exchange in a collective, counted through the mesh: the first, or all pairs of a permute.

    Empty where the text is of a form that is not known.
    """
    text = one.attributes
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", text):
        return [[int(source), int(target)] for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return [[int(device) for device in found[1].split(",") if device]]
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_ORDER}", text):
        return _order(found[2]).reshape(_numbers(found[1]))[:1].tolist()
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}", text):
        return [_group_of_mesh(found[1], found[2], found[3])]
    return [list(range(devices))] if "replica_groups={}" in text else []


def _order(text: str) -> np.ndarray:
    """Devices in the order of "[2,4]", or of "[2,4]T(1,0)", its transpose, or as they are listed, "0,2,1,3"."""
    if not text.startswith("["):
        return np.array(_numbers(text))
    shape, _, transposed = text[1:].partition("]")
    order = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return order.transpose(_numbers(transposed[2:-1])) if transposed else order


def _group_of_mesh(axes: str, devices: str | None, named: str) -> list[int]:
    """The first group of "'a'=8,'b'=8" cut along "'a'", or along a part of an axis, "'a':(1)2"."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = _order(devices) if devices else np.arange(math.prod(sizes.values()))
    order = order.reshape(list(sizes.values()))
    index: list = [0] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named):
        rest = sizes[name] // (int(before) * int(part)) if part else 1
        index[list(sizes).index(name)] = slice(0, rest * int(part), rest) if part else slice(None)
    return order[tuple(index)].reshape(-1).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _instruction(line: str) -> Instruction:
    name = _NAME.match(line)
    rest = line[name.end() :]
    shape, rest = _leading(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = rest.lstrip().split("(", 1)
    inside, attributes = _leading("(" + rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    is_root = "ROOT " in line[: name.end()]
    return Instruction(name[1], shape, opcode, operands, inside[1:-1], attributes.lstrip(", "), is_root)


def _leading(text: str) -> tuple[str, str]:
    """The parenthesised text that `text` begins with, and the rest."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _width(dtype: str) -> float:
    """Bytes of a number."""
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0  # tokens and opaque values have none
