"""The models that are timed: small enough for two cores, of the same sizes as their peers."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from lcx.config import Config
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import Program, lower_step, make_program

VOCABULARY, WIDTH, D_FF, LAYERS, HEADS, WINDOW = 512, 256, 704, 4, 4, 256
ATTENTION = {"type": "attention", "num_heads": HEADS, "num_kv_heads": HEADS}
MLP = {"type": "mlp", "d_ff": D_FF}
# Family: its pattern, its periods and its mixers.
FAMILIES = {
    "transformer": ("attention mlp", LAYERS, {"attention": ATTENTION, "mlp": MLP}),
    "mistral": ("swa mlp", LAYERS, {"swa": ATTENTION | {"window": WINDOW}, "mlp": MLP}),
    "mamba": ("mamba", LAYERS, {"mamba": {"type": "mamba"}}),
    "samba": (
        "mamba mlp swa mlp",
        LAYERS // 2,
        {"mamba": {"type": "mamba"}, "swa": ATTENTION | {"window": WINDOW}, "mlp": MLP},
    ),
}


def make_config(family: str, batch: int, time: int, remat: str | None = None, width: int = WIDTH) -> Config:
    """A family's config in float32; `width` other than WIDTH widens heads and MLPs in proportion.

    remat: one policy for all mixers; None for the default.
    """
    pattern, periods, mixers = FAMILIES[family]
    if width != WIDTH:
        scaled = {"num_heads": HEADS * width // WIDTH, "num_kv_heads": HEADS * width // WIDTH}
        scaled["d_ff"] = D_FF * width // WIDTH
        mixers = {
            name: record | {key: value for key, value in scaled.items() if key in record}
            for name, record in mixers.items()
        }
    model = {
        "family": family,
        "pattern": pattern,
        "periods": periods,
        "mixers": mixers,
        "d_model": width,
        "vocab_size": VOCABULARY,
        "tie_embeddings": False,
        "compute_dtype": "float32",
        "remat": dict.fromkeys(mixers, remat) if remat else {},
    }
    train = {"batch_size": batch, "sequence_length": time, "steps": 1000}
    return Config.from_dict({"model": model, "train": train})


def make_batch(batch: int, time: int, vocabulary: int = VOCABULARY) -> dict[str, np.ndarray]:
    """Random tokens of one document a row."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, time + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((batch, time), np.int32),
        "positions": np.tile(np.arange(time, dtype=np.int32), (batch, 1)),
        "loss_weights": np.ones((batch, time), np.float32),
        "row_index": np.arange(batch, dtype=np.int32),
    }


def train_step(config: Config) -> Callable[[], jax.Array]:
    """`stepper` of a config on one device, which is what its peers have."""
    return stepper(make_program(config, make_mesh(config.mesh, jax.devices()[:1])))


def stepper(program: Program) -> Callable[[], jax.Array]:
    """A call takes one step on the same batch and returns its loss; the state is kept and donated."""
    train = program.config.train
    compiled, state = lower_step(program).compile(), [program.create()]
    batch = program.put(make_batch(train.batch_size, train.sequence_length, program.config.model.vocab_size))

    def step() -> jax.Array:
        state[0], metrics = compiled(state[0], batch)
        return metrics["loss"]

    return step


def waiting(step: Callable[[], jax.Array]) -> Callable[[], float]:
    """The same, until the step is done."""
    return partial(_wait, step)


def _wait(step: Callable[[], jax.Array]) -> float:
    return float(step())
