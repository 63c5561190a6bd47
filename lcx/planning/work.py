"""What one device does in a step, by kind of layer, counted from the compiled program.

A loop's body counts as often as it runs. What a kernel (a custom call) computes inside cannot be read; its arrays can.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lcx.planning.hlo import Instruction, Program, groups_of

EMBEDDING, STACK, OPTIMIZER = "embedding", "stack", "optimizer"  # what is no mixer, besides the head
UNREAD = "unread"  # the mesh axis of a collective whose groups are written in a form that is not known

# Moves nothing and computes nothing, or is counted where it ends up.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota domain opt-barrier "
    "add-dependency custom-call-start custom-call-done get-dimension-size rng-get-and-update-state".split()
)
# Rearranges what is there: the vector units have nothing to compute.
MOVES = frozenset(
    "copy broadcast reshape transpose slice dynamic-slice dynamic-update-slice concatenate pad gather scatter reverse "
    "bitcast-convert copy-start copy-done sort".split()
)
PRODUCTS = frozenset(("dot", "convolution", "fusion", "while", "call", "conditional", "custom-call", "async-start"))


@dataclass
class Work:
    """Of one kind of layer, on one device, in one step: forward, backward and what is computed again.

    Attributes:
      vector: elementwise operations outside of kernels.
      memory: bytes read from and written to main memory.
      wire: bytes sent, by (collective, mesh axes).
      kernels: calls of kernels.
    """

    vector: float = 0.0
    memory: float = 0.0
    wire: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    kernels: int = 0


@dataclass(frozen=True)
class Groups:
    """The mesh, to say which of its axes a collective goes over."""

    axes: Mapping[str, int]  # sizes, in the order of the mesh

    def axes_of(self, one: Instruction) -> tuple[tuple[str, ...], list[int]]:
        """(the axes along which those that exchange differ, the members of the group that is spread widest)."""
        sizes = tuple(self.axes.values())
        groups = groups_of(one, math.prod(sizes))
        if not groups:
            return (UNREAD,), []
        differ = np.zeros(len(sizes), bool)
        for group in groups:
            places = np.array(np.unravel_index(group, sizes))
            differ |= (places != places[:, :1]).any(axis=1)
        axes = tuple(name for name, cut in zip(self.axes, differ, strict=True) if cut)
        return axes, max(groups, key=lambda group: max(group) - min(group))


@dataclass
class Count:
    """Everything that was counted of a program."""

    kinds: dict[str, Work]
    activations: float  # bytes that forward loops stack up for the backward pass
    members: dict[tuple[str, ...], list[int]]  # devices of a group, by mesh axes
    unknown_loops: int  # whose length cannot be read: counted once


def count_work(program: Program, mesh: Mapping[str, int], scopes: Mapping[str, str]) -> Count:
    """Walks the program.

    Args:
      program: of one device.
      mesh: sizes of its axes in order.
      scopes: the kind of layer of each name that a scope may contain.
    """
    counter = _Counter(program, Groups(mesh), scopes)
    counter.walk(program.entry, 1)
    return Count(counter.kinds, counter.activations, counter.members, counter.unknown)


class _Counter:
    def __init__(self, program: Program, groups: Groups, scopes: Mapping[str, str]):
        self.program, self.groups, self.scopes = program, groups, scopes
        self.kinds: dict[str, Work] = {}
        self.members: dict[tuple[str, ...], list[int]] = {}
        self.activations, self.unknown = 0.0, 0

    def walk(self, computation: str | None, times: int, forward: bool = False) -> None:
        """Adds what a computation does, `times` times. forward: inside a loop of the forward pass."""
        here = self.program.computations.get(computation or "", {})
        for one in here.values():
            if one.opcode == "while":
                self._loop(one, times, forward)
            elif one.opcode in ("call", "async-start"):
                self.walk(one.called("to_apply") or one.called("calls"), times, forward)
            elif one.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", one.attributes.split("metadata=")[0]):
                    self.walk(branch, times, forward)
            elif one.opcode not in FREE and not one.opcode.endswith(("-done", "-update")):
                self._one(one, here, times)

    def _loop(self, one: Instruction, times: int, forward: bool) -> None:
        trips = self.program.trips(one)
        self.unknown += trips is None
        is_forward = "jvp(" in one.scope and "transpose(" not in one.scope
        if is_forward and not forward:
            self.activations += self.program.stacked(one)
        self.walk(one.called("body"), times * (trips or 1), forward or is_forward)

    def _one(self, one: Instruction, here: Mapping[str, Instruction], times: int) -> None:
        work = self.kinds.setdefault(self._kind(one), Work())
        inputs = [here[name] for name in one.operands if name in here]
        inner = list(self.program.instructions(one.called("calls"))) if one.opcode == "fusion" else []
        exchange = one if one.collective else next((each for each in inner if each.collective), None)
        if exchange is not None:
            self._exchange(work, one, exchange, here, times)
        elif one.opcode == "custom-call":
            work.kernels += times
        work.vector += times * sum(map(_operations, inner or [one]))
        work.memory += times * (_fused_traffic(inner, one) if inner else _traffic(one, inputs))

    def _exchange(
        self, work: Work, one: Instruction, exchange: Instruction, here: Mapping[str, Instruction], times: int
    ) -> None:
        axes, members = self.groups.axes_of(exchange)
        kind, count = exchange.collective or "", max(len(members), 1)
        if exchange is not one:
            here = self.program.computations[one.called("calls") or ""]
            if kind == "all-reduce" and one.bytes * count <= 1.5 * exchange.bytes:  # each keeps its part of the sum
                kind = "reduce-scatter"
        sent = sum(here[name].bytes for name in exchange.operands if name in here)
        share = {
            "all-gather": count - 1,
            "all-reduce": 2 * (count - 1) / count,
            "collective-permute": 1,
        }.get(kind, (count - 1) / count)
        work.wire[kind, axes] += times * sent * share
        self.members.setdefault(axes, members)

    def _kind(self, one: Instruction) -> str:
        """The kind of layer that an instruction belongs to, by its own name or those of what is fused in it."""
        inner = self.program.instructions(one.called("calls")) if one.opcode == "fusion" else ()
        paths = [path for path in (one.scope, *(each.scope for each in inner)) if path]
        for path in paths:
            for name in re.findall(r"\w+", path):
                if name in self.scopes:
                    return self.scopes[name]
        return STACK if any("jvp(" in path for path in paths) else OPTIMIZER if paths else STACK


def _operations(one: Instruction) -> int:
    """Elementwise operations of an instruction, a reduction's by what it reduces."""
    if one.opcode in FREE or one.opcode in MOVES or one.opcode in PRODUCTS or one.collective:
        return 0
    return one.size


def _traffic(one: Instruction, inputs: Sequence[Instruction]) -> float:
    """Bytes that an instruction on its own reads and writes."""
    if one.opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * _main(one)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main(inputs[1]) if len(inputs) > 1 else 0
    written = (
        sum(array.bytes for array in one.arrays[:1] if array.in_main_memory)
        if one.opcode == "copy-start"
        else (_main(one))
    )
    return written + sum(map(_main, inputs))


def _fused_traffic(inner: Sequence[Instruction], one: Instruction) -> float:
    """Bytes that a fusion reads and writes: of arrays that it only takes slices of, or only writes slices to, those."""
    by_name = {each.name: each for each in inner}
    users: dict[str, list[Instruction]] = {}
    for each in inner:
        for name in each.operands:
            users.setdefault(name, []).append(each)
    total = 0.0
    for each in inner:
        if each.opcode != "parameter" or not all(array.in_main_memory for array in each.arrays):
            continue
        readers = users.get(each.name, [])
        if readers and all(reader.opcode in ("dynamic-slice", "gather", "slice") for reader in readers):
            total += sum(reader.bytes for reader in readers)
        elif not any(_is_target(each.name, reader) for reader in readers):
            total += each.bytes
    updates = [each for each in inner if each.opcode == "dynamic-update-slice"]
    if updates:
        small = sum(by_name[each.operands[1]].bytes for each in updates if each.operands[1] in by_name)
        large = sum(each.bytes for each in updates)
        return total + max(_main(one) - large, 0) + small
    return total + _main(one)


def _is_target(name: str, reader: Instruction) -> bool:
    return reader.opcode == "dynamic-update-slice" and reader.operands[0] == name


def _main(one: Instruction) -> float:
    return sum(array.bytes for array in one.arrays if array.in_main_memory)
