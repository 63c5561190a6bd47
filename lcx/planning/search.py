"""Meshes and remat policies worth compiling, by arithmetic on the shapes: no more than a way to leave out most."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from lcx.config import MESH_AXES, Config
from lcx.models import LanguageModel
from lcx.planning.accounting import abstract_model, flops_by_kind, parameter_count
from lcx.planning.hardware import Hardware
from lcx.planning.plan import Plan

POLICIES = ("none", "dots", "full")  # not "offload": what it costs is not in the compiled program
WIDEST_TENSOR = 8  # heads and channels are cut within a node, or along one axis of a torus
# Arrays of the residual stream's size that a layer keeps for its backward pass, in the compute dtype.
KEPT = {"none": 16.0, "dots": 8.0, "full": 2.0}
# The part of a layer's forward pass that is computed again; "dots" computes what is no product, some of the time.
AGAIN = {"none": 0.0, "dots": 0.05, "offload": 0.05}
POLICIES_PER_MESH = 2
MOST_MIXERS = 4  # of which each has a policy of its own
HALO = 2048  # tokens that each layer is taken to need of the shard of time before
STATE_BYTES = 16.0  # of a parameter: itself, its gradient and two moments, in float32


@dataclass(frozen=True)
class Shape:
    """What a guess knows of the model: its parameters, and `_shares` of its mixers."""

    parameters: int
    layers: dict[str, tuple[int, float]]


@dataclass(frozen=True)
class Guess:
    """What arithmetic says of a candidate: bytes on a device, and seconds a step."""

    memory: float
    seconds: float


def candidates(config: Config, hardware: Hardware) -> Iterator[Config]:
    """The config on each mesh that batch and sequence divide over, under remat policies, the most promising first.

    Policies are chosen by mixer: all of POLICIES for each. Of each mesh come the two choices with which it is fastest;
    the config's own come first among equals.
    """
    model = abstract_model(config.model)
    shape = Shape(parameter_count(model), _shares(model, config))
    found = []
    for sizes in _meshes(hardware.devices):
        mesh = dict(zip(MESH_AXES, sizes, strict=True))
        rows = config.train.batch_size % (mesh["data"] * mesh["fsdp"] * config.train.accumulate)
        if rows or config.train.sequence_length % mesh["seq"] or mesh["tensor"] > WIDEST_TENSOR:
            continue
        for remat in _choices(config):
            guess = _guess(config, hardware, mesh, remat, shape)
            found.append((guess.memory > hardware.memory, guess.seconds, len(found), mesh, remat))
    seen: Counter[str] = Counter()
    for _, _, _, mesh, remat in sorted(found, key=lambda entry: entry[:3]):
        candidate = _with(config, mesh, remat)
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


def _with(config: Config, mesh: dict[str, int], remat: dict[str, str]) -> Config:
    return replace(config, mesh=replace(config.mesh, **mesh), model=replace(config.model, remat=remat))


def _choices(config: Config) -> Iterator[dict[str, str]]:
    """Remat policies by mixer: the config's own, then every choice; one policy for all where mixers are many."""
    names = sorted(config.model.mixers)
    yield config.model.remat_policies
    alike = len(names) > MOST_MIXERS
    for policies in zip(*[POLICIES] * len(names), strict=True) if alike else product(POLICIES, repeat=len(names)):
        yield dict(zip(names, policies, strict=True))


def _shares(model: LanguageModel, config: Config) -> dict[str, tuple[int, float]]:
    """By mixer: how many layers have it, and which part of the model's forward FLOPs is theirs (0 where unknown)."""
    flops = flops_by_kind(model, config.train.sequence_length)
    total = sum(number or 0 for number in flops.values())
    layers = model.stack.by_mixer(lambda mixer: 1)
    return {name: (count, (flops[name] or 0) / total) for name, count in layers.items() if count}


def _guess(config: Config, hardware: Hardware, mesh: dict[str, int], remat: dict[str, str], shape: Shape) -> Guess:
    """Products at the chip's peak; weights gathered over fsdp, gradients summed over data, sums over tensor, halos over
    seq."""
    model, chip = config.model, hardware.chip
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    width = 4 if model.compute_dtype == "float32" else 2
    tokens = config.train.batch_size * config.train.sequence_length / hardware.devices * tensor
    parameters, sublayers = shape.parameters, sum(count for count, _ in shape.layers.values())
    kept = sum(count * KEPT.get(remat[name], KEPT["full"]) for name, (count, _) in shape.layers.items())
    again = sum(part * AGAIN.get(remat[name], 1.0) for name, (_, part) in shape.layers.items())
    memory = STATE_BYTES * parameters / (fsdp * tensor) + tokens * model.d_model * width * kept / tensor
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
