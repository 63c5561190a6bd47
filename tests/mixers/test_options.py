"""Mixers of a config: types, import paths, options and how the papers start them."""

import math
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.errors import UserError
from lcx.mixers import ModelDims, build_mixer, find_mixer

DIMS = ModelDims(d_model=64, sublayers=8)


def mixer(record, dims=DIMS):
    return build_mixer("mine", record, dims, nnx.Rngs(0))


@pytest.mark.parametrize(
    "record, message",
    [
        ({}, "model.mixers.mine has no type"),
        ({"type": "atention", "num_heads": 4}, 'model.mixers.mine.type: unknown mixer type "atention", did you mean'),
        ({"type": "attention"}, '"model.mixers.mine.num_heads" is missing'),
        ({"type": "attention", "num_heads": 7}, "model.mixers.mine: num_heads=7 does not divide d_model=64"),
        ({"type": "attention", "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"type": "attention", "num_heads": 4, "window": 0}, "model.mixers.mine.window"),
        ({"type": "attention", "num_heads": 4, "head_dim": 5}, "head_dim=5 is odd"),
        (
            {"type": "attention", "num_heads": 4, "windw": 8},
            'unknown key "model.mixers.mine.windw": did you mean "window"',
        ),
        ({"type": "mamba", "state_size": "many"}, "model.mixers.mine.state_size must be"),
        ({"type": "mamba", "backend": "tritn"}, "model.mixers.mine: backend: unknown name 'tritn'"),
        ({"type": "mamba", "backend": "pallas_tpu"}, 'model.mixers.mine: backend "pallas_tpu" needs a TPU'),
        ({"type": "attention", "num_heads": 4, "backend": "triton"}, 'model.mixers.mine: backend "triton" needs a GPU'),
        ({"type": "no_such_package.mixers:Mine"}, 'cannot import "no_such_package.mixers"'),
        ({"type": "lcx.config:ModelConfig"}, "is not a subclass of lcx.mixers.Mixer"),
    ],
)
def test_mistakes_are_named(record, message):
    with pytest.raises(UserError, match=message):
        mixer(record)


def test_a_mixer_in_the_users_folder_is_found_and_hides_nothing(tmp_path, monkeypatch):
    """The current folder is searched last: a folder of a package's name must not take the package's place."""
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')")
    (tmp_path / "my_mixers.py").write_text(
        textwrap.dedent("""
        import json
        from lcx.mixers.mlp import MLP

        class Mine(MLP):
            pass
        """)
    )
    monkeypatch.chdir(tmp_path)
    assert find_mixer("my_mixers:Mine").__name__ == "Mine"
    assert isinstance(mixer({"type": "my_mixers:Mine", "d_ff": 8}).up.weight[...], jax.Array)


def test_mamba_starts_as_the_paper_does():
    mamba = mixer({"type": "mamba"}, ModelDims(d_model=256, sublayers=8))
    bias = np.asarray(mamba.dt_bias[...])
    assert -6.9073 <= bias.min() < -6.5 and -2.6 < bias.max() <= -2.2521
    np.testing.assert_allclose(
        np.asarray(mamba.A_log[...])[[0, -1]], np.log(np.arange(1, 17))[None].repeat(2, 0), rtol=1e-6
    )
    np.testing.assert_array_equal(mamba.D[...], 1)
    bounds = {
        "in_proj": (mamba.in_proj.weight, 1 / math.sqrt(256)),
        "x_proj": (mamba.x_proj.weight, 1 / math.sqrt(512)),
        "dt_proj": (mamba.dt_proj, 1 / math.sqrt(16)),
        "conv": (mamba.conv.weight, 0.5),
        "out_proj": (mamba.out_proj.weight, 1 / math.sqrt(512) / math.sqrt(8)),
    }
    for name, (weight, bound) in bounds.items():
        largest = np.abs(np.asarray(weight[...])).max()
        assert 0.98 * bound < largest <= bound, (name, largest, bound)


@pytest.mark.parametrize(
    "init, dense, output", [("small", math.sqrt(2 / (5 * 256)), 2 / (16 * 8)), ("normal", 0.02, 0.02)]
)
def test_normal_schemes(init, dense, output):
    mlp = mixer({"type": "mlp", "d_ff": 512}, ModelDims(d_model=256, sublayers=8, init=init))
    assert abs(np.asarray(mlp.up.weight[...]).std() / dense - 1) < 0.02
    assert abs(np.asarray(mlp.down.weight[...]).std() / output - 1) < 0.02
