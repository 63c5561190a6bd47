"""Every mixer's example and every family: outputs, states and gradients on a mesh are those of one device."""

import math
from functools import cache

import jax
import pytest
from jax.sharding import Mesh

from lcx import laws
from lcx.cli.certify import training, with_dtype
from lcx.config import MESH_AXES, Config, MeshConfig, load_config
from lcx.laws.shrink import shrink
from lcx.laws.trials import trial_chunk
from lcx.mixers import MIXERS, find_mixer
from lcx.parallel.mesh import make_mesh
from lcx.parallel.sharding import batch_shards

MIXED = {"data": 2, "seq": 2, "tensor": 2}
MESHES = [
    MIXED,
    {"seq": 8},
    {"seq": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "seq": 2},
    {"fsdp": 8},
    {"tensor": 4},
    {"seq": 5},
]
USER_MIXER = "examples.moving_average:MovingAverage"
MIXER_EXAMPLES = [
    (name, variant)
    for name, mixer in (*MIXERS.items(), (USER_MIXER, find_mixer(USER_MIXER)))
    for variant in mixer.examples
]
FAMILIES = ["transformer", "mamba", "mamba2", "samba", "infini", "sink", "infini:update=segment_delta"]
FAMILIES += ["sink:form=zero,window=5", "sink:form=token,window=5", "samba:pattern=two-windows"]


def cut(sizes: dict) -> Mesh:
    """A mesh of the first devices."""
    whole = dict.fromkeys(MESH_AXES, 1) | sizes
    return make_mesh(MeshConfig(**whole), jax.devices()[: math.prod(whole.values())])


@cache
def mixer_subject(name: str, variant: str, dtype: str) -> laws.Subject:
    mixer = find_mixer(name)
    return laws.mixer_subject(name, mixer, mixer.examples[variant], dtype)


@cache
def family_subject(family: str, tensor: int, dtype: str) -> laws.Subject:
    return laws.stack_subject(family, family_config(family, {"fsdp": 8, "tensor": tensor}, dtype).model)


def family_config(family: str, sizes: dict, dtype: str) -> Config:
    """A family made small, for a mesh."""
    file, _, options = family.partition(":")
    config = with_dtype(Config.from_dict(load_config(f"configs/{file}.py:{options}")), dtype)
    return shrink(config, dict.fromkeys(MESH_AXES, 1) | sizes, lambda config: None)


def mesh_for(options: dict, sizes: dict) -> Mesh:
    """The mesh; where the key heads do not divide over its tensor, which a run would refuse, time is cut instead."""
    heads = options.get("num_kv_heads", options.get("num_heads", 0))
    sizes = {"tensor": 1, "seq": 1} | sizes
    if heads % sizes["tensor"]:
        sizes |= {"tensor": 1, "seq": sizes["seq"] * sizes["tensor"]}
    return cut(sizes)


def check(subject: laws.Subject, mesh: Mesh, time: int, seed: int = 0) -> float:
    """The largest deviation, from states that hold tokens and from none; the last shard of rows is all padding."""
    rows = batch_shards(mesh) * max(1, 6 // batch_shards(mesh))
    chunk = trial_chunk(subject, time, rows, batch_shards(mesh), seed)
    deviations = [laws.sharding(subject, tried, mesh) for tried in (chunk, laws.from_nothing(subject, chunk))]
    for found in deviations:
        assert found.value <= laws.TOLERANCE[subject.dtype], found
    return max(found.value for found in deviations)


QUICK = [("attention", "sink_tokens"), ("mamba", "normed"), (USER_MIXER, "default")]  # of `make test`


def grid(subjects: list, first: int = 0) -> list:
    """Every subject on every mesh; those that `.ci/run` leaves to `make meshes` are slow: it takes one mesh of each."""
    return [
        pytest.param(subject, mesh, marks=[] if (row + first) % len(MESHES) == column else [pytest.mark.slow])
        for row, subject in enumerate(subjects)
        for column, mesh in enumerate(MESHES)
    ]


@pytest.mark.parametrize("subject", [case for case in MIXER_EXAMPLES if case in QUICK], ids="-".join)
def test_mixers_on_a_mixed_mesh(subject):
    name, variant = subject
    with jax.enable_x64(True):
        mesh = mesh_for(find_mixer(name).examples[variant], MIXED)
        check(mixer_subject(name, variant, "float64"), mesh, time=16)


@pytest.mark.mesh
@pytest.mark.parametrize("subject, mesh", grid(MIXER_EXAMPLES), ids=str)
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_mixers_on_every_mesh(subject, dtype, mesh, record_property):
    name, variant = subject
    time = 30 if mesh.get("seq") == 5 else 32  # of the second, shards have an odd number of tokens
    with jax.enable_x64(dtype == "float64"):
        mesh = mesh_for(find_mixer(name).examples[variant], mesh)
        found = check(mixer_subject(name, variant, dtype), mesh, time, seed=1)
    record_property("deviation", ("outputs, states, gradients of mixers", dtype, found))


@pytest.mark.mesh
@pytest.mark.parametrize("family, mesh", grid(FAMILIES), ids=str)
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_families_on_every_mesh(family, dtype, mesh, record_property):
    with jax.enable_x64(dtype == "float64"):
        time = 30 if mesh.get("seq") == 5 else 32
        found = check(family_subject(family, mesh.get("tensor", 1), dtype), cut(mesh), time)
    record_property("deviation", ("outputs, states, gradients of families", dtype, found))


@pytest.mark.mesh
@pytest.mark.parametrize("family, mesh", grid(FAMILIES, first=3), ids=str)
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_training_on_every_mesh(family, dtype, mesh, record_property):
    """The trainer's loss and the gradient of every parameter, embedding and head included."""
    with jax.enable_x64(dtype == "float64"):
        found = training(family_config(family, mesh, dtype), cut(mesh))
    assert found.value <= laws.TOLERANCE[dtype], found
    record_property("deviation", ("loss and gradients of training", dtype, found.value))
