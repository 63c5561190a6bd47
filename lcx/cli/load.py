"""`lcx.load`: a trained model and its tokenizer, from a run's workdir or an export."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from lcx.config import Config
from lcx.data import Tokenizer, load_tokenizer
from lcx.errors import UserError
from lcx.files import read_json
from lcx.interop.importing import RECORD, Weights, check_stamp, open_weights, read_record
from lcx.models import LanguageModel
from lcx.training.checkpointing import ParameterReader, data_index_of, newest, read_newest
from lcx.training.stages import model_stage_at
from lcx.training.train_state import blueprint

# Where a run's parameters lie: its checkpoints, or what it begins with if it has not begun.
PLACES = ("checkpoints", "imported")
_NOTHING = "{} holds no checkpoint yet; train for at least checkpoint.every steps."


def load(path: epath.PathLike) -> tuple[LanguageModel, Tokenizer]:
    """The model of a workdir's newest whole checkpoint, or of an export, on the first device, and its tokenizer.

    Only reads, so that it may be called while the run goes on. Warns where an export was never compared with its model
    (UserWarning). Raises UserError where `path` is neither, holds no checkpoint yet, holds one of another model, or
    where an export's tensors are not those that were stamped.
    """
    folder = epath.Path(path)
    if (folder / RECORD).exists():
        return _load_export(folder)
    config = read_config(folder)
    plan = blueprint(config)
    device = SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), plan.shapes)
    for place in PLACES:
        found = read_newest(folder / place, {"params": wanted})
        if found is not None:
            step, tree = found
            model = blueprint(config_at(config, folder / place, step)).model(tree["params"])
            return model, load_tokenizer(config.data.tokenizer, config.data.start_token)
    raise UserError(_NOTHING.format(folder))


def check_and_open_export(folder: epath.Path) -> tuple[Weights, dict[str, Any]]:
    """An export's weights and what lcx wrote of it; warns and raises as `load` does."""
    check_stamp(folder)
    return open_weights(folder), read_record(folder)


def _load_export(folder: epath.Path) -> tuple[LanguageModel, Tokenizer]:
    weights, record = check_and_open_export(folder)
    params = jax.device_put(weights.parameters(), jax.local_devices()[0])
    name = record["tokenizer"] if record["tokenizer"] == "bytes" else str(folder / record["tokenizer"])
    return weights.model.model(params), load_tokenizer(name, record["start_token"])


def open_checkpoint(
    path: epath.PathLike, step: int | None = None
) -> tuple[epath.Path, Config, int, Callable[[str, int | None], np.ndarray]]:
    """(workdir, its config, a step, a reader of that step's parameters): the newest step for None.

    Raises UserError as `load` does, and for a step that there is not.
    """
    folder = epath.Path(path)
    config = read_config(folder)
    if step is not None:
        place = "imported" if step == 0 and (folder / "imported").exists() else "checkpoints"
        return _opened(folder / place, config, step)
    for place in PLACES:
        chosen = newest(folder / place)
        if chosen is not None:
            return _opened(folder / place, config, chosen)
    raise UserError(_NOTHING.format(folder))


def _opened(place: epath.Path, config: Config, step: int) -> tuple:
    reader = ParameterReader(place, step, blueprint(config).shapes)
    return place.parent, config_at(config, place, step), step, reader


def config_at(config: Config, folder: epath.Path, step: int) -> Config:
    """The config of the stage that a checkpoint's last step was in: stages may differ in the base of RoPE."""
    if not step or not config.train.stages:
        return model_stage_at(config, 0).config
    return model_stage_at(config, data_index_of(folder, step) - 1).config


def read_config(folder: epath.Path) -> Config:
    """The config of a workdir's run. Raises UserError where it is none."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the workdir of a run: it has no config.json.")
    values = read_json(folder / "config.json") if _is_run(folder) else {}
    if "config" not in values:
        raise UserError(f"{folder} is not the workdir of a run: its config.json is another program's.")
    return Config.from_dict(values["config"])


def _is_run(folder: epath.Path) -> bool:
    return b"format_version" in (folder / "config.json").read_bytes()
