"""`lcx import_hf`: starts a run from pretrained weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lcx.cli.flags import CONFIG, WORKDIR, Flag, parse
from lcx.config import Config, default_config, load_config, override
from lcx.errors import UserError
from lcx.files import write_json

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from lcx.interop.importing import Weights

SUMMARY = """Starts a run from the weights of a Llama, Mistral, Qwen3, Mamba or Mamba-2 folder of transformers, or of an
export of lcx (safetensors only). The model is the folder's; --config gives the rest of the run's config, and fields of
it, also of the model (a rotary base, a window), are overridden as in training."""
FLAGS = [
    Flag("source", "the folder: config.json and model.safetensors, or its parts and their index", required=True),
    WORKDIR,
    Flag(CONFIG.name, "a config file for all but the model; left out: the defaults"),
    Flag("pattern", 'a hybrid begun from the attention model\'s weights: "mamba mlp swa mlp"'),
    Flag("layer_map", "the hybrid's blocks: numbers of source blocks, or - for a new one: 0,1,-,3"),
]


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("import_hf", SUMMARY, FLAGS, argv)
    source, workdir = Path(values.source), Path(values.workdir)
    if not source.is_dir():
        raise UserError(f"--source: there is no folder {source}.")
    if any((workdir / name).exists() for name in ("config.json", "checkpoints")):
        raise UserError(f"the workdir {workdir} holds a run already: use another --workdir.")
    if values.layer_map and not values.pattern:
        raise UserError("--layer_map needs --pattern: without a hybrid, every layer has its own weights.")
    import_hf(values, source, workdir)
    return 0


def import_hf(values: SimpleNamespace, source: Path, workdir: Path) -> None:
    """Writes the workdir: imported/ with the parameters, and config.json last."""
    from lcx.interop.hybrid import parse_map
    from lcx.interop.importing import open_weights
    from lcx.params import count_parameters
    from lcx.training.checkpointing import Checkpoints

    layer_map = parse_map(values.layer_map) if values.layer_map else None
    weights = open_weights(source)
    draft = make_config(values, weights, layer_map)
    set_tokenizer(draft, source, workdir, [key for key, _ in values.overrides])
    config = Config.from_dict(draft)
    params, words = parameters(weights, config, layer_map)
    imported = workdir / "imported"
    checkpoints = Checkpoints(imported, keep=1)
    try:
        if checkpoints.latest() is None:
            checkpoints.save(0, {"params": params})
    finally:
        checkpoints.close()
    record = {"source": str(source), "format": weights.format, "dtype": weights.dtype}
    write_json(workdir / "imported.json", record)
    write_json(workdir / "config.json", {"config": config.to_dict(), "fingerprints": None})
    print(f"{source}: {weights.format}, {count_parameters(params):,} parameters{words}")
    print(f"to train it: python scripts/train.py --config={workdir}/config.json --workdir={workdir}")


def make_config(values: SimpleNamespace, weights: "Weights", layer_map: list[int | None] | None) -> "ConfigDict":
    """The config file's run with the folder's model, or the hybrid of it, changed by the overrides."""
    from lcx.interop.hybrid import hybrid_config

    config = load_config(values.config) if values.config else default_config()
    model = weights.model.config
    if values.pattern:
        named = dict(values.overrides)
        types = {key.split(".")[2]: {"type": text} for key, text in named.items() if _is_type(key)}
        model = hybrid_config(model, values.pattern, types, layer_map and len(layer_map))
    config.model = default_config().model
    config.model.update(model.to_dict())
    for key, text in values.overrides:
        override(config, key, text)
    return config


def _is_type(key: str) -> bool:
    return key.startswith("model.mixers.") and key.endswith(".type")


def set_tokenizer(config: "ConfigDict", source: Path, workdir: Path, overridden: Sequence[str]) -> None:
    """Takes over the folder's tokenizer, and what its encodings begin with, unless the command line says otherwise."""
    from lcx.interop.importing import RECORD, read_record
    from lcx.interop.tokenizer_files import FILE, first_token

    start = None
    if (source / RECORD).exists():
        record = read_record(source)
        start, name = record["start_token"], record["tokenizer"]
    else:
        name = FILE if (source / FILE).exists() else "bytes"
        start = first_token(json.loads((source / FILE).read_text())) if name == FILE else None
    if "data.tokenizer" in overridden:
        return
    if name == FILE:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / FILE).write_bytes((source / FILE).read_bytes())
        name = str((workdir / FILE).resolve())
    config.data.tokenizer = name
    if "data.start_token" not in overridden:
        config.data.start_token = start


def parameters(weights: "Weights", config: Config, layer_map: list[int | None] | None) -> tuple[dict, str]:
    """The run's parameters, and a few words on where they are from."""
    import jax

    from lcx.interop.architecture import architecture
    from lcx.interop.hybrid import graft
    from lcx.interop.importing import fresh
    from lcx.params import path_name

    target, found, words = architecture(config.model), weights.parameters(), ""
    source = weights.model.config
    if config.model.pattern != source.pattern or config.model.periods != source.periods or layer_map:
        found, report = graft(weights.model, found, target, fresh(target, config.train.seed), layer_map)
        words = "; " + ", ".join(f"{count} {kind}" for kind, count in sorted(report.items()))

    def checked(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        array = found
        for key in path:
            array = array.get(key.key, {})
        if getattr(array, "shape", None) != leaf.shape:
            raise UserError(
                f"an override of the model does not fit the weights: {path_name(path)} would be "
                f"{list(leaf.shape)}, and is {list(getattr(array, 'shape', []))} in {weights.folder}."
            )
        return array.astype(leaf.dtype, copy=False)

    return jax.tree_util.tree_map_with_path(checked, target.shapes), words
