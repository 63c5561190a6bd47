"""Reading the weights of Hugging Face folders and of our own exports."""

import json
import warnings
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from lcx.config import ModelConfig
from lcx.errors import UserError
from lcx.files import read_json
from lcx.interop import fidelity, safetensors
from lcx.interop.architecture import Architecture, architecture
from lcx.interop.formats import FORMATS, find_format
from lcx.interop.tables import check_names, fill, lay_out
from lcx.models import LanguageModel
from lcx.params import create, path_name

RECORD = "lcx.json"  # what lcx itself reads of an export
# What files hold besides parameters, or under another name: (ending, what to do with it).
BUFFERS = (".rotary_emb.inv_freq", ".masked_bias")
RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Weights:
    """A folder's model: what it is, and where its weights lie."""

    folder: epath.Path
    format: str  # a name of FORMATS
    model: Architecture
    dtype: str  # of the files, a name of safetensors.DTYPES; the widest that occurs

    def parameters(self) -> dict:
        """The parameters as NumPy arrays in the model's dtype. Raises UserError unless the files hold just those."""
        mapping = lay_out(FORMATS[self.format].names(self.model), self.model.shapes)
        reader = safetensors.Reader(self.folder)
        names = {RENAMED.get(name, name): name for name in reader.shapes if not name.endswith(BUFFERS)}
        if self.model.config.tie_embeddings:
            names.pop("lm_head.weight", None)
        try:
            check_names({name: reader.shapes[there] for name, there in names.items()}, mapping.tensors)
        except ValueError as error:
            raise UserError(f"{self.folder} does not hold what its config.json says: {error}.") from None
        read = lambda piece: reader.rows(names[piece.name], piece.start, piece.shape[0])  # noqa: E731
        dtypes = {path_name(path): leaf.dtype for path, leaf in _leaves(self.model.shapes)}
        found = {path: array.astype(dtypes[path], copy=False) for path, array in fill(mapping, read, self.model.shapes)}
        return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], self.model.shapes)


def _leaves(tree: dict) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


class _Fields(dict):
    """config.json's fields, whose absence is a sentence."""

    def __missing__(self, name: str) -> Any:
        raise UserError(f'its config.json has no "{name}".')


def open_weights(folder: epath.PathLike) -> Weights:
    """The model of a folder: one of Llama, Mistral, Qwen3, Mamba, Mamba-2, or an export of ours.

    Raises UserError for a folder that lcx cannot read, with the field of config.json that is in the way.
    """
    folder = epath.Path(folder)
    if (folder / RECORD).exists():
        record = read_record(folder)
        name, config = record["format"], ModelConfig.from_dict(record["model"])
    else:
        name, config = _read_config(folder)
    reader = safetensors.Reader(folder)
    unknown = sorted(reader.dtypes - _DTYPES.keys())
    if unknown:
        raise UserError(f"{folder} holds tensors of type {unknown[0]}; lcx reads {', '.join(_DTYPES.values())}.")
    dtypes = {_DTYPES[kind] for kind in reader.dtypes}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else "float32"
    return Weights(folder, name, architecture(replace(config, param_dtype="float32")), dtype)


def read_record(folder: epath.Path) -> dict[str, Any]:
    """What lcx wrote of an export of its own. Raises UserError where there is none."""
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is not an export of lcx: it has no {RECORD}.")
    return read_json(folder / RECORD)


def _read_config(folder: epath.Path) -> tuple[str, ModelConfig]:
    try:
        fields = _Fields(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json.") from None
    except (ValueError, TypeError):
        raise UserError(f"{folder / 'config.json'} is damaged: it is not a JSON object.") from None
    try:
        name = find_format(fields)
        return name, ModelConfig.from_dict(FORMATS[name].read(fields))
    except UserError as error:
        raise UserError(f"{folder} cannot be imported: {error}") from None


def check_stamp(folder: epath.Path) -> None:
    """Warns of an export that was never run beside its model.

    Raises UserError where a tensor is not what was stamped.
    """
    stamp = read_json(folder / fidelity.FILE) if (folder / fidelity.FILE).exists() else {"reason": "it has no stamp"}
    if not stamp.get("verified"):
        warnings.warn(f"{folder} is unverified: {stamp.get('reason')}", stacklevel=3)
    form = FORMATS[read_record(folder)["format"]]
    reader = safetensors.Reader(folder)
    present = reader.shapes
    for name, expected in stamp.get("checksums", {}).items():
        if name not in present or safetensors.checksum(reader.tensor(name)) != expected:
            where = form.blocks(name) or "outside the layers"
            raise UserError(
                f"{folder} was changed after it was stamped: {name} ({where}) is not what it was; export it again."
            )


def fresh(model: Architecture, seed: int) -> dict:
    """New parameters of a model, as NumPy arrays that may be changed."""
    return jax.tree.map(np.array, create(lambda: LanguageModel(model.config, nnx.Rngs(seed)))[1])
