"""Meshes and remat policies worth compiling, by arithmetic on the shapes: no more than a way to leave out most."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lcx.config import MESH_AXES, Config
from lcx.planning.accounting import abstract_model, parameter_count
from lcx.planning.hardware import Hardware
from lcx.planning.plan import Plan

POLICIES = ("none", "dots", "full")
WIDEST_TENSOR = 8  # heads and channels are cut within a node, or along one axis of a torus
# Arrays of the residual stream's size that a layer keeps for its backward pass, in the compute dtype.
KEPT = {"none": 16.0, "dots": 8.0, "full": 2.0}
POLICIES_PER_MESH = 2
HALO = 2048  # tokens that each layer is taken to need of the shard of time before
STATE_BYTES = 16.0  # of a parameter: itself, its gradient and two moments, in float32


@dataclass(frozen=True)
class Guess:
    """What arithmetic says of a candidate: bytes on a device, and seconds a step."""

    memory: float
    seconds: float


def candidates(config: Config, hardware: Hardware) -> Iterator[Config]:
    """The config on each mesh that batch and sequence divide over, under each remat policy, the most promising first.

    Of each mesh the two policies with which it is fastest. The config's own policies come first among equals.
    """
    model = abstract_model(config.model)
    parameters, sublayers = parameter_count(model), config.model.periods * len(model.stack.layers)
    found = []
    for sizes in _meshes(hardware.devices):
        mesh = dict(zip(MESH_AXES, sizes, strict=True))
        rows = config.train.batch_size % (mesh["data"] * mesh["fsdp"] * config.train.accumulate)
        if rows or config.train.sequence_length % mesh["seq"] or mesh["tensor"] > WIDEST_TENSOR:
            continue
        for policy in (None, *POLICIES):
            guess = _guess(config, hardware, mesh, policy, parameters, sublayers)
            found.append((guess.memory > hardware.memory, guess.seconds, len(found), mesh, policy))
    seen: Counter[str] = Counter()
    for _, _, _, mesh, policy in sorted(found, key=lambda entry: entry[:3]):
        candidate = _with(config, mesh, policy)
        where = candidate.mesh.key
        if not seen[candidate.key] and seen[where] < POLICIES_PER_MESH:
            seen.update((candidate.key, where))
            yield candidate


def order(plan: Plan) -> tuple[bool, float, int]:
    """What plans are sorted by: those that fit, the fastest by the estimate, the smallest."""
    return not plan.fits, plan.seconds or math.inf, plan.memory.total


def _meshes(devices: int) -> Iterator[tuple[int, ...]]:
    """All (data, fsdp, seq, tensor) of that many devices."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data in divisors:
        for fsdp in divisors:
            for seq in divisors:
                tensor, rest = divmod(devices, data * fsdp * seq)
                if tensor and not rest:
                    yield data, fsdp, seq, tensor


def _with(config: Config, mesh: dict[str, int], policy: str | None) -> Config:
    remat = config.model.remat if policy is None else {} if policy == "none" else dict.fromkeys(_mixers(config), policy)
    return replace(config, mesh=replace(config.mesh, **mesh), model=replace(config.model, remat=remat))


def _mixers(config: Config) -> list[str]:
    return sorted(config.model.mixers)


def _guess(
    config: Config, hardware: Hardware, mesh: dict[str, int], policy: str | None, parameters: int, sublayers: int
) -> Guess:
    """Products at the chip's peak; weights gathered over fsdp, gradients summed over data, sums over tensor, halos over
    seq."""
    model, chip = config.model, hardware.chip
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    width = 4 if model.compute_dtype == "float32" else 2
    tokens = config.train.batch_size * config.train.sequence_length / hardware.devices * tensor
    kept = KEPT.get(policy or "", 0.0) or sum(
        KEPT.get(model.remat.get(name, "none"), 2.0) for name in _mixers(config)
    ) / (len(_mixers(config)))
    again = policy == "full" or (policy is None and "full" in model.remat.values())
    memory = STATE_BYTES * parameters / (fsdp * tensor) + tokens * model.d_model * width * sublayers * kept / tensor
    if chip is None:
        return Guess(memory, data + fsdp + tensor)
    compute = (6 + 2 * again) * parameters * tokens / tensor / chip.matrix["bfloat16"]
    ring = lambda size: (size - 1) / size  # noqa: E731
    sent = (2 + again) * width * parameters / tensor * ring(fsdp) + 4 * parameters / tensor * ring(fsdp)
    sent += 8 * parameters / (fsdp * tensor) * ring(data)
    sent += 4 * sublayers * tokens * model.d_model * width * ring(tensor)
    if mesh["seq"] > 1:
        rows = config.train.batch_size / (data * fsdp)
        sent += 4 * sublayers * rows * min(HALO, config.train.sequence_length / mesh["seq"]) * model.d_model * width
    return Guess(memory, compute + sent / chip.link)
