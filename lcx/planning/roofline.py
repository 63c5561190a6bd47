"""An estimate of a step's time: of each kind of layer the slowest of four resources, at the rates that are published.

No program reaches these rates in all its parts, and nothing here is measured: times are lower bounds, and the
utilisation that follows an upper one. Kinds of layers follow each other; within one, matrix units, vector units, memory
and links work side by side. Exponentials inside kernels are not counted, nor the latency of an exchange.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lcx.config import remat_chunk
from lcx.planning.accounting import HEAD, TRAINING
from lcx.planning.hardware import Hardware
from lcx.planning.work import Count, Work

WHAT = "an estimate from published rates: a lower bound of the time"


@dataclass(frozen=True)
class Times:
    """Seconds a step that a kind of layer takes of each resource of one device."""

    matrix: float
    vector: float
    memory: float
    link: float

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        times = asdict(self)
        return max(times, key=times.__getitem__)

    @property
    def seconds(self) -> float:
        return max(asdict(self).values())


def passes(kind: str, remat: Mapping[str, str]) -> int:
    """How often a kind of layer's forward products are computed in a step, a backward pass being two.

    The head's logits are made twice, and a mixer's under a policy that keeps no products.
    """
    policy = remat.get(kind)  # None: of what is no mixer
    again = kind == HEAD or policy == "full" or bool(policy and remat_chunk(policy))
    return TRAINING + again


def layer_times(
    count: Count,
    flops: Mapping[str, int],
    vector_flops: Mapping[str, int],
    remat: Mapping[str, str],
    hardware: Hardware,
    dtype: str,
) -> dict[str, Times]:
    """Seconds by kind of layer.

    Args:
      count: of the compiled program.
      flops: forward FLOPs of a whole batch on all devices, by kind.
      vector_flops: the part of them that is no matrix product: what kernels compute, which cannot be read.
      remat: the policy of each mixer.
      dtype: of matrix products.
    """
    chip = hardware.chip
    assert chip is not None
    peak = chip.matrix[dtype]
    found = {}
    for kind in {**flops, **count.kinds}:
        work, forward, inside = count.kinds.get(kind, Work()), flops.get(kind, 0), vector_flops.get(kind, 0)
        share = passes(kind, remat) / hardware.devices
        vector = work.vector + (inside * share if work.kernels else 0)
        found[kind] = Times(
            matrix=(forward - inside) * share / peak,
            vector=vector / chip.vector,
            memory=work.memory / chip.memory_rate,
            link=link_time(work, count.members, hardware),
        )
    return found


def link_time(work: Work, members: Mapping[tuple[str, ...], list[int]], hardware: Hardware) -> float:
    """Seconds that a kind of layer's exchanges take, one after the other.

    A TPU's group is a ring along one axis of the torus, which is sent round both ways; a permute goes one way. GPUs of
    one node have its links, those of several the network.
    """
    chip = hardware.chip
    assert chip is not None
    total = 0.0
    for (collective, axes), sent in work.wire.items():
        rate = chip.network if hardware.crosses_nodes(members.get(axes, [])) else chip.link
        one_way = hardware.platform == "tpu" and collective == "collective-permute"
        total += sent / (rate / 2 if one_way else rate)
    return total
