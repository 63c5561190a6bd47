"""Suites on a mesh that cuts time, on sharded parameters, are suites on one device, to 1e-5."""

import math

import jax
import numpy as np
import pytest

from lcx.cli.run import InLoop
from lcx.config import MESH_AXES, Config, default_config
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import make_program
from lcx.training.workdir import Workdir

SUITES = {
    "perplexity": {"lengths": [64, 128], "documents": 2, "whole": 0},
    "passkey": {"lengths": [128], "depths": 1, "samples": 2, "style": "plain"},
    "state": {"length": 128, "points": 4},
    "entropy": {"length": 64, "rows": 2, "chunk_size": 32},
}
HEADS = {"type": "attention", "num_heads": 4, "num_kv_heads": 4}
MIXERS = {
    "mamba": {"type": "mamba", "state_size": 4},
    "swa": HEADS | {"window": 12, "sink": "logit"},
    "infini": HEADS | {"type": "infini", "segment_length": 8},
    "attention": HEADS,
}


def scalars(folder, **mesh: int) -> dict[str, float]:
    values = default_config().to_dict()
    values["model"] |= {"pattern": " ".join(MIXERS), "mixers": MIXERS, "d_model": 16}
    values["train"] |= {"batch_size": 4, "sequence_length": 64}
    values["evaluation"] |= {"suites": list(SUITES), "options": SUITES, "chunk_size": 64, "batch_size": 4}
    values["mesh"] = dict.fromkeys(MESH_AXES, 1) | mesh
    config = Config.from_dict(values)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[: math.prod(mesh.values())]))
    return InLoop(config, Workdir.at(folder)).run(program, program.create())


@pytest.mark.mesh
def test_evaluation_in_the_loop_is_the_same_on_a_mesh(tmp_path):
    alone, cut = (scalars(tmp_path / name, **mesh) for name, mesh in (("one", {}), ("four", {"seq": 4})))
    assert alone.keys() == cut.keys() and len(alone) > 12
    for name, value in alone.items():
        np.testing.assert_allclose(cut[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
