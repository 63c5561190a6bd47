"""Parameters: what they declare, and that their values depend on the seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.config import Config, load_config
from lcx.layers.initializers import Normal
from lcx.models import LanguageModel
from lcx.params import create, declarations, param, path_name, split
from lcx.training.trainer import make_program


def tiny(family: str = "samba", **model) -> Config:
    config = load_config(f"configs/{family}.py:size=tiny")
    config.model.update(model)
    return Config.from_dict(config)


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_declaration_is_what_the_call_said():
    weight = param(nnx.Rngs(0), (2, 3), ("a", None), Normal(1.0), decay=False, learning_rate=0.01, absolute=True)

    class Holder(nnx.Module):
        def __init__(self):
            self.weight = weight

    (declared,) = jax.tree.leaves(declarations(Holder()), is_leaf=lambda leaf: hasattr(leaf, "axes"))
    assert (declared.axes, declared.decay, declared.learning_rate, declared.absolute) == (
        ("a", None),
        False,
        0.01,
        True,
    )


def test_shape_and_axes_must_fit():
    with pytest.raises(ValueError, match=r"needs 2 axes"):
        param(nnx.Rngs(0), (2, 3), ("a",), Normal(1.0))


def test_values_do_not_depend_on_the_dtype():
    """They are drawn in float32 and then cast: bfloat16 is the rounding of float32, float64 its extension."""
    with jax.enable_x64(True):
        values = {
            dtype: flat(
                create(
                    lambda dtype=dtype: LanguageModel(tiny(param_dtype=dtype, pattern="mamba mlp").model, nnx.Rngs(1))
                )[1]
            )
            for dtype in ("float32", "bfloat16", "float64")
        }
    for name, value in values["float32"].items():
        np.testing.assert_array_equal(values["float64"][name], value.astype(np.float64), err_msg=name)
        np.testing.assert_array_equal(values["bfloat16"][name], value.astype(jnp.bfloat16), err_msg=name)


def test_values_are_the_same_eager_compiled_and_sharded():
    config = tiny(pattern="mamba mlp")
    eager = flat(split(LanguageModel(config.model, nnx.Rngs(config.train.seed)))[1])
    compiled = flat(create(lambda: LanguageModel(config.model, nnx.Rngs(config.train.seed)))[1])
    meshed = config.to_dict() | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    state = make_program(Config.from_dict(meshed)).create()
    weight = state.params["stack"]["layers"]["1_mlp"]["mixers"]["mlp"]["up"]["weight"]
    assert weight.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    sharded = flat(state.params)
    for name, value in eager.items():
        np.testing.assert_array_equal(compiled[name], value, err_msg=name)
        np.testing.assert_array_equal(sharded[name], value, err_msg=name)


def test_decay_is_declared_for_matrices_alone():
    _, params = create(lambda: LanguageModel(tiny().model, nnx.Rngs(0)))
    declared = declarations(nnx.eval_shape(lambda: LanguageModel(tiny().model, nnx.Rngs(0))))
    is_declaration = lambda leaf: hasattr(leaf, "axes")  # noqa: E731
    undecayed = {
        path_name(path).rpartition("/")[2]
        for path, leaf in jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_declaration)
        if not leaf.decay
    }
    assert undecayed == {"A_log", "D", "bias", "dt_bias", "scale"}
    axes = jax.tree.map(lambda leaf: len(leaf.axes), declared, is_leaf=is_declaration)
    stacked = jax.tree.map(lambda leaf, count: leaf.ndim - count, params, axes)
    assert set(jax.tree.leaves(stacked["stack"])) == {1} and set(jax.tree.leaves(stacked["embedding"])) == {0}
