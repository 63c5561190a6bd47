"""Fifty steps on every mesh are fifty steps on one device: losses to 1e-5, one model with every kind of mixer."""

import math
from functools import cache

import jax
import numpy as np
import pytest

from lcx.config import MESH_AXES, Config, default_config
from lcx.laws.trials import trial_batch
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import lower_step, make_program

STEPS = 50
MESHES = {
    "data=2,fsdp=2,seq=2": {"data": 2, "fsdp": 2, "seq": 2},
    "seq=4,tensor=2": {"seq": 4, "tensor": 2},
    "seq=8": {"seq": 8},
    "fsdp=8": {"fsdp": 8},
    "tensor=4": {"tensor": 4},
}
FIRST = "seq=4,tensor=2"  # of `.ci/run`
HEADS = {"type": "attention", "num_heads": 4, "num_kv_heads": 4}
MIXERS = {
    "mamba": {"type": "mamba", "state_size": 4},
    "swa": HEADS | {"window": 12, "sink": "logit"},
    "infini": HEADS | {"type": "infini", "segment_length": 8, "update": "segment_delta"},
    "mamba2": {"type": "mamba2", "head_dim": 8, "state_size": 8, "num_groups": 4, "chunk_size": 8},
    "attention": HEADS,
    "mlp": {"type": "mlp", "d_ff": 48},
}


def config(**mesh: int) -> Config:
    values = default_config().to_dict()
    values["model"] |= {"pattern": " ".join(MIXERS), "mixers": MIXERS, "d_model": 32, "vocab_size": 64}
    values["train"] |= {"batch_size": 8, "sequence_length": 64, "steps": STEPS, "z_loss": 1e-4}
    values["optimizer"] |= {"learning_rate": 1e-3, "warmup_steps": 5}
    values["mesh"] = dict.fromkeys(MESH_AXES, 1) | mesh
    return Config.from_dict(values)


def losses(config: Config) -> list[float]:
    """Of fifty steps, each on a batch of its own, with padding and rows that do not count."""
    count = math.prod(getattr(config.mesh, axis) for axis in MESH_AXES)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:count]))
    step, state, found = lower_step(program).compile(), program.create(), []
    for seed in range(STEPS):
        batch = trial_batch(config, dict.fromkeys(MESH_AXES, 2), seed)
        state, metrics = step(state, program.put(batch))
        found.append(float(metrics["loss"]))
    return found


@cache
def alone() -> list[float]:
    return losses(config())


@pytest.mark.mesh
@pytest.mark.parametrize(
    "mesh", [pytest.param(name, marks=[] if name == FIRST else [pytest.mark.slow]) for name in MESHES]
)
def test_fifty_steps(mesh, record_property):
    found, expected = losses(config(**MESHES[mesh])), alone()
    worst = np.abs(np.array(found) / expected - 1).max()
    record_property("deviation", (f"losses of {STEPS} steps", "float32", float(worst)))
    assert worst < 1e-5 and np.ptp(expected) > 0.01, worst
