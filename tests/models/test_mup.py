"""muP: what parameters declare at other widths, and the coordinate check."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.cli.main import main
from lcx.config import Config, load_config
from lcx.models import LanguageModel
from lcx.params import Declaration, declarations, path_name, split


def model_of(d_model: int, **fields) -> LanguageModel:
    config = load_config("configs/transformer.py:size=tiny")
    config.model.update(d_model=d_model, periods=1, vocab_size=64, **fields)
    config.model.mixers.attention.num_heads = d_model // 64
    config.model.mixers.mlp.d_ff = 2 * d_model
    return LanguageModel(Config.from_dict(config).model, nnx.Rngs(0))


def by_name(model: LanguageModel) -> dict[str, tuple[np.ndarray, Declaration]]:
    """Values and declarations by their path."""
    found = {}
    declared = jax.tree.leaves(declarations(model), is_leaf=lambda leaf: isinstance(leaf, Declaration))
    leaves = jax.tree_util.tree_leaves_with_path(split(model)[1])
    for (path, value), declaration in zip(leaves, declared, strict=True):
        found[path_name(path)] = np.asarray(value), declaration
    return found


def test_at_the_base_width_nothing_changes():
    """With heads of width 64, at which 8 / K is 1 / sqrt(K)."""
    for scheme in ("fan_in", "small"):
        standard, mup = (by_name(model_of(64, init=scheme, mup_base_width=base)) for base in (None, 64))
        for name, (value, declaration) in standard.items():
            np.testing.assert_array_equal(mup[name][0], value, err_msg=name)
            assert mup[name][1] == declaration


@pytest.mark.parametrize("scheme", ["fan_in", "small", "normal"])
def test_at_four_times_the_width(scheme):
    base, wide = (by_name(model_of(width, init=scheme, mup_base_width=64, tie_embeddings=False)) for width in (64, 256))
    for name, (value, declaration) in wide.items():
        spread = np.std(value) / np.std(base[name][0]) if value.ndim > 2 or "table" in name else None
        if name.split("/")[-2] in ("query", "key", "value", "output", "gate", "up", "down"):
            assert declaration.learning_rate == 0.25 and spread == pytest.approx(0.5, rel=0.03), name
        elif name == "norm/scale":  # the last one, by which the logits are multiplied
            assert declaration.learning_rate == 0.25 and (value == 0.25).all()
        else:
            assert declaration.learning_rate == 1.0, name
            assert spread is None or spread == pytest.approx(1, rel=0.03), name


def test_mamba_keeps_the_standard_parametrisation():
    def declared(base):
        config = load_config("configs/samba.py:size=tiny")
        config.model.mup_base_width = base
        model = nnx.eval_shape(lambda: LanguageModel(Config.from_dict(config).model, nnx.Rngs(0)))
        return declarations(model)["stack"]["layers"]

    standard, mup = declared(None), declared(32)
    assert mup["0_mamba"] == standard["0_mamba"]
    assert mup["1_mlp"] != standard["1_mlp"] and mup["2_swa"] != standard["2_swa"]


def slopes(folder, base, widths: str, periods: int) -> tuple[int, dict[str, float]]:
    code = main(
        [
            "coordinates",
            "--config=configs/transformer.py:size=tiny,sequence_length=64",
            "--config.train.batch_size=8",
            "--config.mesh.data=8",
            f"--config.model.periods={periods}",
            f"--config.model.mup_base_width={base}",
            f"--widths={widths}",
            f"--workdir={folder / str(base)}",
        ]
    )
    result = json.loads((folder / str(base) / "coordinates.json").read_text())
    assert (folder / str(base) / "coordinates.png").stat().st_size > 10_000
    print(f"base width {base}: {result['slopes']}")
    return code, result["slopes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "widths, periods",
    [
        ("64,256", 2),
        pytest.param("64,128,256,512,1024", 2, marks=pytest.mark.long),
    ],
)
def test_coordinate_check(tmp_path, widths, periods):
    """Activations keep their size over widths with muP, and without it they grow."""
    code, flat = slopes(tmp_path, 64, widths, periods)
    assert code == 0 and all(abs(slope) <= 0.1 for slope in flat.values()), flat
    code, steep = slopes(tmp_path, "none", widths, periods)
    assert code == 1 and all(slope > 0.3 for slope in steep.values()), steep


@pytest.mark.parametrize("widths", ["64", "64,64", "a,b", "0,64"])
def test_widths_that_cannot_be_are_refused(widths, tmp_path, capsys):
    arguments = ["coordinates", "--config=configs/transformer.py", f"--widths={widths}", f"--workdir={tmp_path}"]
    assert main(arguments) == 2
    assert f'--widths: cannot read "{widths}"' in capsys.readouterr().err
