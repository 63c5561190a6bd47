"""What a format is, and what all of them need."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lcx.errors import UserError
from lcx.interop.architecture import Architecture
from lcx.interop.tables import Table

Fields = dict[str, Any]  # of a config.json


@dataclass(frozen=True)
class Format:
    """One way to write a model down."""

    architecture: str  # the class there
    model_type: str
    fit: Callable[[Architecture], Fields | str]  # the fields of config.json; or why the model is not of this kind
    names: Callable[[Architecture], Table]
    read: Callable[[Fields], Fields]  # from config.json's fields to the `model` section of an lcx config
    blocks: Callable[[str], str]  # the module of the block there that a tensor belongs to, "" for none
    layers_per_block: int = 1  # layers here
    library: str = "transformers"  # that runs it
    caveat: Callable[[Architecture], str] = lambda model: ""  # why that library cannot load it as it is
    code: bool = False  # does modeling_lcx.py belong to it?


def in_layers(prefix: str) -> Callable[[str], str]:
    def block(name: str) -> str:
        rest = name.removeprefix(f"{prefix}.layers.")
        return "" if rest == name else f"{prefix}.layers.{rest.partition('.')[0]}"

    return block


def section(
    fields: Fields, pattern: str, periods: int, norm_eps: str, default_eps: float, tied: bool = False
) -> Fields:
    """What all models have; `norm_eps` is the name of the field there, `tied` what is meant where nothing is said."""
    return {
        "pattern": pattern,
        "periods": periods,
        "d_model": fields["hidden_size"],
        "vocab_size": fields["vocab_size"],
        "norm_eps": fields.get(norm_eps, default_eps),
        "tie_embeddings": fields.get("tie_word_embeddings", tied),
    }


def expect(fields: Fields, name: str, value: Any) -> None:
    if fields.get(name, value) != value:
        raise UserError(f"{name} is {fields[name]!r}: lcx computes {value!r} only.")
