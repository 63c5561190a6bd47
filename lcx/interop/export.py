"""Writing a model down for other libraries: weights, config, tokenizer, model card, fidelity stamp."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from lcx import __version__
from lcx.config import ModelConfig
from lcx.errors import UserError
from lcx.files import write_json
from lcx.interop import fidelity, safetensors
from lcx.interop.architecture import Architecture, architecture
from lcx.interop.card import Facts, model_card
from lcx.interop.formats import FORMATS, TRANSFORMERS, choose_format
from lcx.interop.importing import RECORD, read_record
from lcx.interop.tables import Correspondence, Piece, lay_out
from lcx.interop.tokenizer_files import write_tokenizer
from lcx.params import path_name

CODE = "modeling_lcx.py"

# A parameter at a path, or one period of it where it is stacked.
Read = Callable[[str, int | None], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How to export."""

    format: str = "auto"  # a name of FORMATS
    dtype: str = "float32"  # of the files
    shard_bytes: int = 5 * 10**9  # of a file, at most
    tolerance: float = fidelity.TOLERANCE
    prompt: int | None = None  # tokens of the stamp's prompts; None: past windows and segments, within reason
    run: bool = True  # run the export beside lcx; False: only compare its tensors


@dataclass(frozen=True)
class Source:
    """What is exported."""

    config: ModelConfig
    read: Read
    vocab_size: int  # rows of the vocabulary that are not padding
    tokenizer: str  # "bytes", or the path of a JSON file
    start_token: int | None
    end_token: int | None
    facts: Facts


class _Plan:
    """An export made out: what each file holds, before anything is written."""

    def __init__(self, source: Source, settings: Settings):
        config = replace(source.config, vocab_size=source.vocab_size)
        self.model: Architecture = architecture(config)
        self.name, self.fields = choose_format(self.model, settings.format)
        self.form = FORMATS[self.name]
        self.mapping: Correspondence = lay_out(self.form.names(self.model), self.model.shapes)
        self._read, self._kind = source.read, safetensors.DTYPES[settings.dtype]
        self._pieces: dict[str, list[Piece]] = {}
        for piece in sorted(self.mapping.pieces, key=lambda piece: piece.start):
            self._pieces.setdefault(piece.name, []).append(piece)

    def values(self, name: str) -> np.ndarray:
        """A tensor there, in the dtype of the checkpoint."""
        parts = [piece.there(self._read(piece.path, piece.period)) for piece in self._pieces[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def float32_model(self) -> tuple[Architecture, dict]:
        """The model as it computes in float32, with the weights that the files have."""
        config = self.model.config
        mixers = {name: dict(record) | self._portable(record) for name, record in config.mixers.items()}
        dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "residual_dtype"), "float32")
        model = architecture(replace(config, mixers=mixers, remat={}, **dtypes))

        def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            array = self._read(path_name(path), None)
            array = array[: leaf.shape[0]]  # of the vocabulary, without padding
            return array.astype(self._kind).astype(np.float32)

        return model, jax.tree_util.tree_map_with_path(value, model.shapes)

    @staticmethod
    def _portable(record: Any) -> dict[str, str]:
        return {"backend": "auto"} if "backend" in record else {}


def export(source: Source, folder: epath.PathLike, settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Writes a model into a folder that is not there yet, and proves that it is the model.

    The files are written into `<folder>.partial`, which takes the folder's name in the end; where the proof fails it
    becomes `<folder>.failed`. Writing holds one tensor in memory, the proof one model at a time.

    Returns the fidelity stamp. Raises UserError for a model that the format cannot hold, a folder that is there, or an
    export that is not the model (`fidelity.Unfaithful`).
    """
    folder = epath.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out: {folder} is there and not empty: choose another folder, or remove it.")
    plan = _Plan(source, settings)
    partial, failed = (folder.parent / f"{folder.name}.{state}" for state in ("partial", "failed"))
    for remains in (partial, failed):
        if remains.exists():
            remains.rmtree()
    partial.mkdir(parents=True)
    say(f"writing {len(plan.mapping.tensors)} tensors as {plan.form.architecture} ({settings.dtype})")
    safetensors.write(partial, plan.mapping.tensors, plan.values, settings.dtype, settings.shard_bytes)
    _write_records(partial, source, settings, plan)
    try:
        stamp = _stamp(partial, plan, settings, say)
    except fidelity.Unfaithful as error:
        partial.rename(failed)
        raise fidelity.Unfaithful(f"{error} What was written lies in {failed}.") from None
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return stamp


def check(source: Source, folder: epath.PathLike, settings: Settings, say: Callable[[str], None] = print) -> dict:
    """Stamps an export that is there anew; its format and dtype are its own. Returns the stamp, raises as `export`."""
    folder = epath.Path(folder)
    record = read_record(folder)
    settings = replace(settings, format=record["format"], dtype=record["dtype"])
    source = replace(source, vocab_size=record["model"]["vocab_size"])
    return _stamp(folder, _Plan(source, settings), settings, say)


def _write_records(folder: epath.Path, source: Source, settings: Settings, plan: _Plan) -> None:
    """Everything but the weights and the stamp."""
    tokenizer = (source.tokenizer, source.start_token, source.end_token)
    special = write_tokenizer(folder, *tokenizer, source.facts.sequence_length)
    absent = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    common = {"architectures": [plan.form.architecture], "model_type": plan.form.model_type, "dtype": settings.dtype}
    if plan.form.library == "transformers" and "hidden_act" in plan.fields and "rope_parameters" in plan.fields:
        common["max_position_embeddings"] = source.facts.sequence_length
    _write(folder / "config.json", common | absent | special | plan.fields)
    _write(folder / "generation_config.json", {"_from_model_config": False, "do_sample": False} | special)
    if plan.form.code:
        (folder / CODE).write_text((Path(__file__).parent / CODE).read_text())
    record = {
        "lcx_version": __version__,
        "format": plan.name,
        "dtype": settings.dtype,
        "model": plan.model.config.to_dict(),
        "tokenizer": "bytes" if source.tokenizer == "bytes" else "tokenizer.json",
        "start_token": source.start_token,
        "sequence_length": source.facts.sequence_length,
        "step": source.facts.step,
    }
    write_json(folder / RECORD, record)
    (folder / "README.md").write_text(model_card(source.facts, plan.form, plan.model, settings.dtype, TRANSFORMERS))


def _write(path: epath.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def _stamp(folder: epath.Path, plan: _Plan, settings: Settings, say: Callable[[str], None]) -> dict:
    """Proves the export and writes fidelity.json, also where the proof fails."""
    report: dict[str, Any] = {"verified": False, "reason": None}
    try:
        report["checksums"] = fidelity.check_tensors(folder, plan.form, plan.mapping, plan.values, settings.dtype)
        report["reason"] = _why_not(plan, settings)
        if report["reason"] is None:
            say("comparing with PyTorch")
            compared = fidelity.compare(folder, plan.form, *plan.float32_model(), settings.tolerance, settings.prompt)
            report |= compared | {"verified": True}
        else:
            say(f"not run beside PyTorch: {report['reason']}")
    except fidelity.Unfaithful as error:
        report["reason"] = str(error)
        write_json(folder / fidelity.FILE, report)
        raise
    write_json(folder / fidelity.FILE, report)
    return report


def _why_not(plan: _Plan, settings: Settings) -> str | None:
    if not settings.run:
        return "it was asked not to"
    if plan.form.library != "transformers":
        return f"{plan.form.library} has kernels that need a GPU{plan.form.caveat(plan.model)}"
    missing = fidelity.missing_libraries()
    return f"{' and '.join(missing)} not installed" if missing else None
