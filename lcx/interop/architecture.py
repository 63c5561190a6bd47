"""What a model is made of, as formats ask for it: its layers in full, with every option of every mixer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from lcx.config import ModelConfig
from lcx.mixers import find_mixer
from lcx.models import LanguageModel
from lcx.models.pattern import Pattern, layer_names, parse_pattern
from lcx.params import split
from lcx.schema import build


@dataclass(frozen=True)
class Architecture:
    """A model without values."""

    config: ModelConfig
    pattern: Pattern  # the mixers of each layer of a period
    options: Mapping[str, Any]  # of each mixer, defaults filled in
    types: Mapping[str, str]
    graphdef: nnx.GraphDef
    shapes: dict

    @property
    def layer_paths(self) -> list[str]:
        """Where each layer of a period stands in the parameter tree."""
        return [f"stack/layers/{name}" for name in layer_names(self.pattern)]

    def alternates(self, *types: str) -> list[Any] | None:
        """The options of each type where the layers are mixers of these types in turn, all of a type alike, else None.

        What has no meaning for the function that the model is (a backend, say) is left out of the comparison.
        """
        if len(self.pattern) % len(types) or any(len(names) > 1 for names in self.pattern):
            return None
        found: list[Any] = [None] * len(types)
        for index, (name,) in enumerate(self.pattern):
            kind = index % len(types)
            options = _neutral(self.options[name])
            if self.types[name] != types[kind] or found[kind] not in (None, options):
                return None
            found[kind] = options
        return found

    def model(self, params: dict) -> LanguageModel:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)


def architecture(config: ModelConfig) -> Architecture:
    """The architecture of a config; costs no memory. Raises UserError for a model that cannot be built."""
    graphdef, shapes = split(nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0))))
    pattern = parse_pattern(config.pattern, config.mixers)
    names = {name for layer in pattern for name in layer}
    records = {name: dict(config.mixers[name]) for name in sorted(names)}
    types = {name: record.pop("type") for name, record in records.items()}
    options = {name: build(find_mixer(types[name]).Options, record, name) for name, record in records.items()}
    resolved = {name: _resolved(record, config.d_model) for name, record in options.items()}
    return Architecture(config, pattern, resolved, types, graphdef, shapes)


# Options that say how something is computed, or how it began, not what.
_HOW = {"backend": "auto", "exchange": "ring", "gate_learning_rate": 0.01}


def _neutral(options: Any) -> Any:
    return replace(options, **{name: value for name, value in _HOW.items() if hasattr(options, name)})


def _resolved(options: Any, width: int) -> Any:
    """The options with what follows from the model's width in the place of None."""
    if hasattr(options, "num_heads"):
        heads = options.num_heads
        return replace(options, num_kv_heads=options.num_kv_heads or heads, head_dim=options.head_dim or width // heads)
    if hasattr(options, "dt_rank"):
        return replace(options, dt_rank=options.dt_rank or -(-width // 16))
    return options
