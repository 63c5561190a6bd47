"""`lcx.load`: a trained model and its tokenizer, from a run's workdir."""

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import SingleDeviceSharding

from lcx.config import Config
from lcx.data import Tokenizer, load_tokenizer
from lcx.errors import UserError
from lcx.files import read_json
from lcx.models import LanguageModel
from lcx.training.checkpointing import read_newest
from lcx.training.stages import model_stage_at
from lcx.training.train_state import blueprint


def load(path: epath.PathLike) -> tuple[LanguageModel, Tokenizer]:
    """The model of a workdir's newest whole checkpoint, on the first device, and its tokenizer.

    Only reads, so that it may be called while the run goes on. Raises UserError where `path` is no workdir, holds no
    checkpoint yet, or holds one of another model.
    """
    folder = epath.Path(path)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not the workdir of a run: it has no config.json.")
    config = Config.from_dict(read_json(folder / "config.json")["config"])
    plan = blueprint(config)
    device = SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), plan.shapes)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=device)
    found = read_newest(folder / "checkpoints", {"params": wanted, "data_index": index})
    if found is None:
        raise UserError(f"{folder} holds no checkpoint yet; train for at least checkpoint.every steps.")
    _, tree = found
    stage = model_stage_at(config, max(0, int(tree["data_index"]) - 1))  # of the checkpoint's last step
    return blueprint(stage.config).model(tree["params"]), load_tokenizer(config.data.tokenizer, config.data.start_token)
