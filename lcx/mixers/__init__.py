"""The table of mixers, and how a config's records become modules.

A type is a name of the table or an import path, "my_package.mixers:MyMixer": a mixer of one's own lives in one's own
repository and gets everything that these have.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lcx.errors import UserError, suggest
from lcx.mixers.attention import Attention
from lcx.mixers.base import Context, Mixer, ModelDims
from lcx.mixers.infini import Infini
from lcx.mixers.mamba import Mamba
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.mlp import MLP
from lcx.schema import build

__all__ = ["MIXERS", "Context", "Mixer", "ModelDims", "build_mixer", "find_mixer"]

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "infini": Infini,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mlp": MLP,
}


def find_mixer(type_name: str, key: str = "type") -> type[Mixer]:
    """The class of a mixer's type.

    An import path is looked up in the installed packages and in the current folder. Raises UserError that names `key`
    for a name that is not in the table, a module or class that is not there, or a class that is no Mixer.
    """
    if ":" not in type_name:
        if type_name not in MIXERS:
            raise UserError(f'{key}: unknown mixer type "{type_name}", {suggest(type_name, MIXERS)}')
        return MIXERS[type_name]
    module_name, _, class_name = type_name.partition(":")
    here = os.getcwd()
    sys.path.append(here)  # last, and only for this import: a folder here must not hide an installed package
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise UserError(
            f'{key}: cannot import "{module_name}" ({error}); install it or run from its folder.'
        ) from error
    finally:
        sys.path.remove(here)
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise UserError(f'{key}: "{type_name}" is not a subclass of lcx.mixers.Mixer.')
    return found


def build_mixer(name: str, record: Mapping[str, Any], dims: ModelDims, rngs: nnx.Rngs) -> Mixer:
    """The mixer that `model.mixers.<name>` describes: {"type": ..., options}.

    Raises UserError for an unknown type or option, or a value that does not fit the model.
    """
    key = f"model.mixers.{name}"
    if "type" not in record:
        raise UserError(f"{key} has no type; set one of: {', '.join(MIXERS)}, or an import path.")
    found = find_mixer(record["type"], f"{key}.type")
    options = build(found.Options, {option: value for option, value in record.items() if option != "type"}, key)
    try:
        return found(options, dims, rngs)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
