"""What a run will take of some hardware: memory, FLOPs, traffic and an estimate of time, from its compiled program."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lcx.config import Config
from lcx.models.stack import scope_of
from lcx.planning.accounting import HEAD, TRAINING, abstract_model, flops_by_kind, vector_flops_by_kind
from lcx.planning.hardware import Hardware
from lcx.planning.hlo import read_program
from lcx.planning.roofline import WHAT, Times, layer_times
from lcx.planning.work import EMBEDDING, Count, count_work


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. They add up to the total.

    Attributes:
      parameters, optimizer: as their shardings say.
      batch: the arguments besides: a batch, counters, carried states, padding.
      activations: what forward loops keep for the backward pass; None where the program could not be compiled.
      temporaries: all else that the program needs while it runs: gradients, layers' inner values, gathered weights.
    """

    parameters: int
    optimizer: int
    batch: int
    activations: int | None
    temporaries: int | None
    total: int

    @property
    def state(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.parameters + self.optimizer


@dataclass(frozen=True)
class Compiled:
    """What came of compiling a train step.

    Attributes:
      text: the program; None where it does not fit into the device's memory, which the compiler then says.
      expected: bytes of the arguments on one device, by their shapes and shardings.
      arguments, temporaries, outputs: the same and others as compiled; outputs without those that take an argument's
        place.
      needed: all bytes that the compiler says the program needs.
    """

    text: str | None
    expected: int
    arguments: int
    temporaries: int | None
    outputs: int
    needed: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """See `make_plan`; `to_dict` is plan.json."""

    hardware: Hardware
    mesh: Mapping[str, int]
    config: Config
    memory: Memory
    flops: Mapping[str, int | None]  # forward, of a whole batch, by kind of layer
    count: Count | None
    times: Mapping[str, Times] | None
    compiled: Compiled
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.hardware.memory and self.memory.temporaries is not None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.batch_size * self.config.train.sequence_length

    @property
    def model_flops(self) -> int | None:
        """Of a step: forward and backward, without what remat computes again."""
        counts = list(self.flops.values())
        return None if None in counts else TRAINING * sum(counts)

    @property
    def seconds(self) -> float | None:
        """An estimate for a step."""
        return sum(times.seconds for times in self.times.values()) if self.times else None

    @property
    def mfu(self) -> float | None:
        """The model FLOPs utilisation that the estimate means."""
        if not self.seconds or self.model_flops is None or self.hardware.chip is None:
            return None
        peak = self.hardware.chip.matrix[compute_dtype(self.config, self.hardware)]
        return self.model_flops / (self.seconds * self.hardware.devices * peak)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "fits": self.fits,
            "hardware": {
                "name": self.hardware.name,
                "devices": self.hardware.devices,
                "bytes_per_device": int(self.hardware.memory),
            },
            "mesh": dict(self.mesh),
            "batch_size": self.config.train.batch_size,
            "sequence_length": self.config.train.sequence_length,
            "remat": dict(self.config.model.remat),
            "bytes_per_device": asdict(self.memory),
            "argument_bytes": {"by_shapes": self.compiled.expected, "compiled": self.compiled.arguments},
            "model_flops": self._flops(),
            "wire": self._wire(),
            "layers": {kind: asdict(times) | {"bound": times.bound} for kind, times in (self.times or {}).items()},
            "estimate": self._estimate(),
            "compile_seconds": round(self.compiled.seconds, 1),
            "notes": self.notes,
        }

    def _flops(self) -> dict[str, Any]:
        by_kind = {kind: None if count is None else TRAINING * count for kind, count in self.flops.items()}
        total = self.model_flops
        per_token = None if total is None else total / self.tokens
        return {"per_step": total, "per_token": per_token, "by_layer": by_kind}

    def _wire(self) -> list[dict[str, Any]]:
        """Bytes that a device sends in a step."""
        kinds = self.count.kinds if self.count else {}
        return [
            {"layer": kind, "collective": collective, "axes": list(axes), "bytes": round(sent)}
            for kind, work in kinds.items()
            for (collective, axes), sent in work.wire.items()
        ]

    def _estimate(self) -> dict[str, Any] | None:
        if not self.seconds:
            return None
        rate = self.tokens / self.seconds
        return {"what": WHAT, "seconds_per_step": self.seconds, "tokens_per_second": rate, "mfu": self.mfu}


def make_plan(
    config: Config, hardware: Hardware, mesh: Mapping[str, int], compiled: Compiled, state: Mapping[str, int]
) -> Plan:
    """The plan of a compiled train step.

    Args:
      config: what was compiled.
      hardware: what for.
      mesh: sizes of its axes, in order.
      compiled: of `mesh`.
      state: bytes on one device of the "parameters" and the "optimizer".
    """
    model, train = abstract_model(config.model), config.train
    batch = lambda counts: {kind: None if n is None else n * train.batch_size for kind, n in counts.items()}  # noqa: E731
    flops = batch(flops_by_kind(model, train.sequence_length))
    count = times = None
    notes = []
    if compiled.text is not None:
        count = count_work(read_program(compiled.text), mesh, scopes_of(config))
        if count.unknown_loops:
            notes.append(f"{count.unknown_loops} loops are of a length that cannot be read, and counted once")
    unknown = [kind for kind, number in flops.items() if number is None]
    if unknown:
        notes.append(f"{', '.join(unknown)}: the mixer does not know its FLOPs, so there is no estimate")
    elif count and hardware.chip:
        vector = batch(vector_flops_by_kind(model, train.sequence_length))
        dtype = compute_dtype(config, hardware)
        if dtype in hardware.chip.matrix:
            times = layer_times(count, flops, vector, config.model.remat_policies, hardware, dtype)
    memory = split_memory(compiled, state, count)
    return Plan(hardware, mesh, config, memory, flops, count, times, compiled, notes)


def split_memory(compiled: Compiled, state: Mapping[str, int], count: Count | None) -> Memory:
    """What the bytes of a device are for."""
    parameters, optimizer = state["parameters"], state["optimizer"]
    batch = compiled.arguments - parameters - optimizer
    if compiled.temporaries is None or count is None:
        return Memory(parameters, optimizer, batch, None, None, compiled.needed)
    working = compiled.temporaries + compiled.outputs
    activations = min(int(count.activations), working)
    return Memory(parameters, optimizer, batch, activations, working - activations, compiled.arguments + working)


def scopes_of(config: Config) -> dict[str, str]:
    """The kind of layer of each scope that a program names."""
    return {scope_of(name): name for name in config.model.mixers} | {HEAD: HEAD, EMBEDDING: EMBEDDING}


def compute_dtype(config: Config, hardware: Hardware) -> str:
    """What matrices are multiplied in there."""
    dtype = config.model.compute_dtype
    if dtype == "auto":
        return "float32" if hardware.platform == "cpu" else "bfloat16"
    return dtype
