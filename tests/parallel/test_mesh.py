"""Meshes over slices, and rules that a config changes."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx.config import Config, MeshConfig
from lcx.errors import UserError
from lcx.parallel.mesh import abstract_mesh, make_mesh
from lcx.parallel.sharding import constrain, flatten_tokens, on_mesh, rules_of
from lcx.training.trainer import make_program


def chip(index: int, of_slice: int) -> SimpleNamespace:
    """What a mesh asks of a device."""
    return SimpleNamespace(
        id=index, slice_index=of_slice, process_index=of_slice, platform="cpu", device_kind="cpu", client=None
    )


def test_slices_differ_on_the_data_axis_alone(monkeypatch):
    monkeypatch.setattr("lcx.parallel.mesh.Mesh", lambda devices, *_, **__: SimpleNamespace(devices=devices))
    chips = [chip(index, of_slice=index // 4) for index in range(8)]
    mesh = make_mesh(MeshConfig(data=4, seq=2), chips[::-1])
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]


def test_data_divides_over_slices():
    with pytest.raises(UserError, match="data=1 does not divide over the 2 slices .* make it a multiple"):
        make_mesh(MeshConfig(data=1, seq=2), [chip(0, 0), chip(1, 1)])


@pytest.mark.parametrize(
    "sizes, shape",
    [
        (dict(data=-1), (8, 1, 1, 1)),
        (dict(data=-1, seq=4), (2, 1, 4, 1)),
        (dict(data=-1, fsdp=64), (1, 64, 1, 1)),  # more than are here: what the axes name
        (dict(data=2, fsdp=2, seq=8, tensor=4), (2, 2, 8, 4)),
    ],
)
def test_a_mesh_may_be_looked_at_without_its_devices(sizes, shape):
    assert abstract_mesh(MeshConfig(**sizes)).axis_sizes == shape


def tiny(**mesh) -> Config:
    mixers = {"swa": {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "window": 4}}
    model = {"pattern": "swa", "mixers": mixers, "d_model": 32}
    return Config.from_dict({"model": model, "mesh": mesh, "train": {"batch_size": 8, "sequence_length": 16}})


def test_rules_of_parameters_are_the_configs():
    def layout(**changed) -> tuple:
        params = make_program(
            tiny(fsdp=2, tensor=2, **changed), abstract_mesh(tiny(data=1, fsdp=2, tensor=2).mesh)
        ).abstract.params
        leaves = params["embedding"]["table"], params["stack"]["layers"]["0_swa"]["mixers"]["swa"]["query"]["weight"]
        return tuple(tuple(leaf.sharding.spec) for leaf in leaves)

    assert layout() == (("tensor", "fsdp"), (None, "fsdp", "tensor", None))
    rules = {"vocab": "", "d_model": "fsdp tensor", "heads": "", "kv_heads": ""}
    assert layout(parameter_rules=rules) == ((None, ("fsdp", "tensor")), (None, ("fsdp", "tensor"), None, None))


def test_rules_of_activations_are_the_configs():
    rules = {"batch": "data tensor", "heads": "", "kv_heads": "", "groups": "", "inner": "", "d_ff": ""}
    program = make_program(tiny(data=4, tensor=2, activation_rules=rules))
    assert tuple(program.batch_shardings["tokens"].spec) == (("data", "tensor"), None)
    with program.on_mesh():
        held = jax.jit(lambda x: constrain(x, ("batch", "time", "heads")))(jax.numpy.zeros((8, 16, 4)))
    assert held.sharding.shard_shape(held.shape) == (1, 16, 4)
    with on_mesh(program.mesh):
        held = jax.jit(lambda x: constrain(x, ("batch", "time", "heads")))(jax.numpy.zeros((8, 16, 4)))
    assert held.sharding.shard_shape(held.shape) == (2, 16, 2)


@pytest.mark.parametrize(
    "mesh, sentence",
    [
        (dict(parameter_rules={"vocap": "fsdp"}), 'no axis is called "vocap": did you mean "vocab"?'),
        (dict(parameter_rules={"vocab": "fspd"}), 'parameter_rules.vocab: the mesh has no axis "fspd": did you mean'),
        (dict(parameter_rules={"vocab": "seq seq"}), 'parameter_rules.vocab: "seq seq" names an axis twice'),
        (dict(parameter_rules={"vocab": "fsdp"}, fsdp=2), "fsdp cuts both vocab and d_model of embedding/table"),
        (dict(activation_rules={"heads": "seq"}), "seq cuts both time and heads"),
        (dict(activation_rules={"batch": "data tensor"}), "tensor cuts both batch and heads"),
        (dict(activation_rules={"batch": "data"}, data=3, fsdp=2), "does not divide over 3 devices (mesh.data)"),
    ],
)
def test_rules_that_cannot_be(mesh, sentence):
    with pytest.raises(UserError) as refused:
        config = tiny(**mesh)
        make_program(config, abstract_mesh(config.mesh))
    assert sentence in str(refused.value)


def test_a_users_axis_may_be_cut():
    assert rules_of(MeshConfig(parameter_rules={"experts": "tensor"}), {"experts"}).parameters["experts"] == ("tensor",)


def test_flat_tokens_stay_on_their_devices():
    """They come apart into what they were, with no exchange, whatever cuts the features."""
    mesh = make_mesh(MeshConfig(data=2, seq=2, tensor=2), jax.devices()[:8])
    x = np.arange(4 * 6 * 8.0).reshape(4, 6, 8)

    @jax.jit
    def there_and_back(x):
        tokens, apart = flatten_tokens(constrain(x, ("batch", "time", "heads")))
        return tokens, apart(2 * tokens)

    with on_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "seq", "tensor")))
        tokens, doubled = there_and_back(x)
        program = there_and_back.lower(x).compile().as_text()
    assert not re.search(r" (all-\w+|collective-permute|reduce-scatter)\(", program)
    np.testing.assert_array_equal(doubled, 2 * np.asarray(x))
    assert sorted(map(tuple, np.asarray(tokens))) == sorted(map(tuple, np.asarray(x).reshape(24, 8)))
