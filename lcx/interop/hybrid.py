"""A hybrid begun from another model's weights: what has a counterpart is taken over, the rest is new.

Layers come in blocks, a mixer and the MLPs after it; block i of the hybrid has its counterpart in a block of the
source. Attention is taken over by attention of any window and by Infini-attention, whose projections are the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lcx.config import ModelConfig
from lcx.errors import UserError
from lcx.interop.architecture import Architecture
from lcx.mixers import MIXERS
from lcx.models.pattern import layer_names, parse_pattern

WINDOW = 2048  # of a mixer called swa that says nothing of it
TAKES_OVER = {("attention", "infini")}  # besides a type its own


def hybrid_config(source: ModelConfig, pattern: str, mixers: Mapping[str, Any], blocks: int | None) -> ModelConfig:
    """The config of the hybrid.

    Args:
      source: of the attention model.
      pattern: of the hybrid; its mixers are those of the source by name, `swa` (the source's attention with a window),
        types by their own names, or what `mixers` gives.
      mixers: options by the mixer's name, which go first.
      blocks: how many blocks the hybrid has; None: as many as the source.

    Raises UserError for a mixer that is not known, or blocks that the pattern does not divide.
    """
    names = [name for name in MIXERS] + [*source.mixers, *mixers, "swa"]
    layers = parse_pattern(pattern, dict.fromkeys(names))
    used = {name for layer in layers for name in layer}
    records = {name: _record(name, source) | dict(mixers.get(name, {})) for name in sorted(used)}
    types = {name: record["type"] for name, record in records.items()}
    each = sum(any(types[name] != "mlp" for name in layer) for layer in layers)
    blocks = blocks or source.periods * _blocks_a_period(source)
    if not each or blocks % each:
        raise UserError(
            f'--pattern="{pattern}" has {each} blocks, which do not divide {blocks}: give a --layer_map with one '
            "source block, or -, for each block of the hybrid."
        )
    return replace(source, family="custom", pattern=pattern, mixers=records, periods=blocks // each, remat={})


def _record(name: str, source: ModelConfig) -> dict[str, Any]:
    if name in source.mixers:
        return dict(source.mixers[name])
    attention = next((dict(record) for record in source.mixers.values() if record["type"] == "attention"), {})
    if name == "swa":
        return attention | {"type": "attention", "window": attention.get("window") or WINDOW}
    if name in ("attention", "infini"):
        kept = ("num_heads", "num_kv_heads", "head_dim", "rope_base", "qk_norm")
        return {option: attention[option] for option in kept if option in attention} | {"type": name}
    return {"type": name}


def _blocks_a_period(config: ModelConfig) -> int:
    layers = parse_pattern(config.pattern, config.mixers)
    return sum(any(config.mixers[name]["type"] != "mlp" for name in layer) for layer in layers)


def parse_map(text: str) -> list[int | None]:
    """ "0,1,-,3" as source blocks; - is a block that is all new. Raises UserError."""
    try:
        return [None if part.strip() == "-" else int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f'--layer_map="{text}" must be numbers of source blocks, or -, separated by commas.') from None


def graft(
    source: Architecture, weights: dict, target: Architecture, fresh: dict, layer_map: Sequence[int | None] | None
) -> tuple[dict, Counter]:
    """The hybrid's parameters, and how many mixers of each kind were taken over ("attention") or are new ("new mamba").

    Args:
      source, weights: the attention model and its parameters, NumPy arrays.
      target, fresh: the hybrid and new parameters of it, which are filled in place.
      layer_map: for each block of the hybrid a block of the source, None for a new one; None: block by block.

    Raises UserError for a map that does not fit.
    """
    there, here = _blocks(source), _blocks(target)
    layer_map = list(range(len(here))) if layer_map is None else list(layer_map)
    if len(layer_map) != len(here):
        raise UserError(f"--layer_map has {len(layer_map)} entries; the hybrid has {len(here)} blocks.")
    beyond = [block for block in layer_map if block is not None and not 0 <= block < len(there)]
    if beyond:
        raise UserError(f"--layer_map: the source has no block {beyond[0]}; it has {len(there)}, counted from 0.")
    report: Counter = Counter()
    for block, layers in zip(layer_map, here, strict=True):
        old = [] if block is None else there[block]
        for index, layer in enumerate(layers):
            counterpart = old[index] if index < len(old) else None
            report.update(_take(source, weights, counterpart, target, fresh, layer))
    for part in ("embedding", "norm", "head"):
        if part in fresh and part in weights:
            _copy(weights[part], fresh[part])
    return fresh, report


Place = tuple[int, int]  # the period, the layer within it


def _blocks(model: Architecture) -> list[list[Place]]:
    """The layers of each block: one with a mixer, and the MLPs after it."""
    blocks: list[list[Place]] = []
    for period in range(model.config.periods):
        for index, names in enumerate(model.pattern):
            if not blocks or any(model.types[name] != "mlp" for name in names):
                blocks.append([])
            blocks[-1].append((period, index))
    return blocks


def _take(
    source: Architecture, weights: dict, old: Place | None, target: Architecture, fresh: dict, new: Place
) -> list[str]:
    period, index = new
    layer = fresh["stack"]["layers"][layer_names(target.pattern)[index]]
    if old is None:
        return [f"new {target.types[name]}" for name in target.pattern[index]]
    from_period, from_index = old
    counterpart = weights["stack"]["layers"][layer_names(source.pattern)[from_index]]
    _copy(counterpart["norm"], layer["norm"], from_period, period)
    taken = []
    for name in target.pattern[index]:
        kind = target.types[name]
        match = next((other for other in source.pattern[from_index] if _fits(source, other, target, name)), None)
        if match is not None:
            _copy(counterpart["mixers"][match], layer["mixers"][name], from_period, period)
        taken.append(kind if match is not None else f"new {kind}")
    return taken


def _fits(source: Architecture, other: str, target: Architecture, name: str) -> bool:
    kinds = (source.types[other], target.types[name])
    if kinds[0] != kinds[1] and kinds not in TAKES_OVER:
        return False
    if hasattr(target.options[name], "num_heads"):
        for option in ("num_heads", "num_kv_heads", "head_dim"):
            a, b = getattr(source.options[other], option), getattr(target.options[name], option)
            if a != b:
                raise UserError(
                    f'model.mixers.{name}.{option}={b} keeps "{name}" from taking over the source\'s attention, which '
                    f"has {a}; leave it as it is."
                )
    return True


def _copy(old: dict, new: dict, from_period: int | None = None, period: int | None = None) -> None:
    """Copies the parameters that both have and that have one shape."""
    for name, value in old.items():
        if isinstance(value, dict):
            if name in new:
                _copy(value, new[name], from_period, period)
        elif name in new:
            given = value if from_period is None else value[from_period]
            place = new[name] if period is None else new[name][period]
            if np.shape(given) == np.shape(place):
                place[...] = given
