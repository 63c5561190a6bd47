"""A trained model to be evaluated: of a step, of an export, or of another window, base of RoPE or cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
from etils import epath
from ml_collections import ConfigDict

from lcx.cli.load import check_and_open_export, open_checkpoint
from lcx.cli.material import config_of_export
from lcx.config import Config, override
from lcx.data import Tokenizer, load_tokenizer
from lcx.errors import UserError
from lcx.evaluation.policies import apply_policy
from lcx.interop.importing import RECORD
from lcx.models import LanguageModel
from lcx.params import path_name
from lcx.training.train_state import Blueprint, blueprint


@dataclass(frozen=True)
class Trained:
    """A model with what is known of it."""

    folder: epath.Path
    config: Config  # of its run, changed as was asked
    step: int
    model: LanguageModel
    tokenizer: Tokenizer
    variant: str  # what makes it another model than was trained, as a part of a file's name; "": nothing


def open_trained(
    path: epath.PathLike, step: int | None = None, changes: Sequence[tuple[str, str]] = (), cache: str = ""
) -> Trained:
    """The model of a workdir's checkpoint, the newest for None, or of an export, on the first device.

    Args:
      changes: (field, text) of the config; those of `model` evaluate a variant of the trained parameters.
      cache: a cache policy for full attention, as `apply_policy` reads it.

    Raises UserError as `lcx.load` does, for an unknown field, and for a change that needs other parameters.
    """
    folder = epath.Path(path)
    if (folder / RECORD).exists():
        if step is not None:
            raise UserError(f"{folder} is an export, which has one step: leave out --step.")
        weights, record = check_and_open_export(folder)
        name = record["tokenizer"] if record["tokenizer"] == "bytes" else str(folder / record["tokenizer"])
        config = config_of_export(name, record["start_token"], record["sequence_length"] or 512)
        config, step = replace(config, model=weights.model.config), record["step"] or 0
        changed = change(config, changes)
        params = weights.parameters()
    else:
        folder, config, step, reader = open_checkpoint(folder, step)
        changed = change(config, changes)
        shapes = blueprint(config).shapes
        params = jax.tree_util.tree_map_with_path(lambda path, _: reader(path_name(path)), shapes)
    plan = blueprint(changed)
    check_shapes(blueprint(config), plan)
    model = plan.model(jax.device_put(params, jax.local_devices()[0]))
    if cache:
        model = apply_policy(model, cache)
    tokenizer = load_tokenizer(changed.data.tokenizer, changed.data.start_token)
    return Trained(folder, changed, step, model, tokenizer, variant_name(changes, cache))


def change(config: Config, changes: Sequence[tuple[str, str]]) -> Config:
    """A config with fields set from text. Raises UserError for an unknown field or an impossible value."""
    values = ConfigDict(config.to_dict(), type_safe=False)
    for key, text in changes:
        override(values, key, text)
    return Config.from_dict(values) if changes else config


def check_shapes(trained: Blueprint, wanted: Blueprint) -> None:
    """Raises UserError where the second model has other parameters than the first."""
    there, here = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(plan.shapes)}
        for plan in (trained, wanted)
    )
    for name in [*there, *(name for name in here if name not in there)]:
        if there.get(name) != here.get(name):
            was, now = (str(list(side[name])) if name in side else "absent" for side in (there, here))
            raise UserError(
                f"--set makes a model with other parameters ({name} is {was} in the checkpoint and would be {now}); a "
                "variant may change what a model does with its parameters: windows, positions, sinks."
            )


def variant_name(changes: Sequence[tuple[str, str]], cache: str) -> str:
    """What was changed, for a file's name: "swa.window=256,cache=h2o-budget=64"."""
    parts = [f"{key.removeprefix('model.').removeprefix('mixers.')}={text}" for key, text in changes if is_model(key)]
    parts += [f"cache={cache}"] if cache else []
    return ",".join(parts).replace("/", "-").replace(":", "-").replace(" ", "")


def is_model(key: str) -> bool:
    """Whether a field of the config makes another model, or other tokens."""
    return key.startswith(("model.", "data.tokenizer", "data.start_token"))
