"""The formats: how a model is called and described elsewhere, and back.

A format is a row of FORMATS. Where its `fit` finds that a model is one of its own, it gives `config.json`'s fields;
`names` is the table of names; `read` turns such a config.json into a `model` section. Adding a format is adding a row.
"""

from collections.abc import Mapping
from typing import Any

from lcx.config import choose
from lcx.errors import UserError
from lcx.interop.architecture import Architecture
from lcx.interop.formats.base import Fields, Format
from lcx.interop.formats.fla import FLA
from lcx.interop.formats.llama import LLAMA, MISTRAL, QWEN3
from lcx.interop.formats.mamba import MAMBA, MAMBA2
from lcx.interop.formats.own import LCX

__all__ = ["FORMATS", "TRANSFORMERS", "Format", "choose_format", "find_format"]

TRANSFORMERS = ">=5.0,<6"  # the versions that exports are for

# In the order in which a model's own format is looked for: the first that fits.
FORMATS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
    "lcx": LCX,
    "fla": FLA,
}


def choose_format(model: Architecture, name: str) -> tuple[str, Fields]:
    """The format called `name`, or the model's own for "auto", and config.json's fields.

    Raises UserError for an unknown name, and for a model that cannot be written so, with the reason.
    """
    if name == "auto":
        fits = {known: form.fit(model) for known, form in FORMATS.items()}
        found = next((known for known, fields in fits.items() if not isinstance(fields, str)), "lcx")
        if isinstance(fits[found], str):
            raise UserError(f"the model cannot be exported: {fits[found]}.")
        return found, fits[found]
    fields = choose("format", name, FORMATS).fit(model)
    if isinstance(fields, str):
        raise UserError(f"the model cannot be exported with --format={name}: {fields}; leave --format out.")
    return name, fields


def find_format(fields: Mapping[str, Any]) -> str:
    """The format of a config.json. Raises UserError for a kind of model that lcx does not read."""
    kind = fields.get("model_type")
    for name, form in FORMATS.items():
        if form.model_type == kind:
            return name
    known = ", ".join(form.model_type for form in FORMATS.values())
    raise UserError(f'its config.json has model_type "{kind}"; lcx reads {known}.')
