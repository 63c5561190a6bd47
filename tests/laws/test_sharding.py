"""Every mixer's example and every family: outputs, states and gradients on a mesh are those of one device."""

import math
from functools import cache

import jax
import pytest
from jax.sharding import Mesh

from lcx import laws
from lcx.cli.certify import with_dtype
from lcx.config import Config, MeshConfig, load_config
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


def name_of(mesh: dict) -> str:
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


def cut(sizes: dict) -> Mesh:
    """A mesh of the first devices."""
    whole = dict.fromkeys(("data", "fsdp", "seq", "tensor"), 1) | sizes
    return make_mesh(MeshConfig(**whole), jax.devices()[: math.prod(whole.values())])


@cache
def mixer_subject(name: str, variant: str, dtype: str) -> laws.Subject:
    mixer = find_mixer(name)
    return laws.mixer_subject(name, mixer, mixer.examples[variant], dtype)


@cache
def family_subject(family: str, tensor: int, dtype: str) -> laws.Subject:
    file, _, options = family.partition(":")
    config = with_dtype(Config.from_dict(load_config(f"configs/{file}.py:{options}")), dtype)
    sizes = {"data": 1, "fsdp": 8, "seq": 1, "tensor": tensor}
    return laws.stack_subject(family, shrink(config, sizes, lambda config: None).model)


def mesh_for(options: dict, sizes: dict) -> Mesh:
    """The mesh; where the key heads do not divide over its tensor, which a run would refuse, time is cut instead."""
    heads = options.get("num_kv_heads", options.get("num_heads", 0))
    sizes = {"tensor": 1, "seq": 1} | sizes
    if heads % sizes["tensor"]:
        sizes |= {"tensor": 1, "seq": sizes["seq"] * sizes["tensor"]}
    return cut(sizes)


def check(subject: laws.Subject, mesh: Mesh, time: int, seed: int = 0) -> None:
    """From states that hold tokens and from none; the last shard of rows is all padding."""
    rows = batch_shards(mesh) * max(1, 6 // batch_shards(mesh))
    chunk = trial_chunk(subject, time, rows, batch_shards(mesh), seed)
    for tried in (chunk, laws.from_nothing(subject, chunk)):
        found = laws.sharding(subject, tried, mesh)
        assert found.value <= laws.TOLERANCE[subject.dtype], found


@pytest.mark.parametrize("name, variant", [case for case in MIXER_EXAMPLES if case != ("infini", "linear")])
def test_mixers_on_a_mixed_mesh(name, variant):
    with jax.enable_x64(True):
        mesh = mesh_for(find_mixer(name).examples[variant], MIXED)
        check(mixer_subject(name, variant, "float64"), mesh, time=16)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name, variant", MIXER_EXAMPLES)
def test_mixers_on_every_mesh(name, variant, dtype, mesh):
    time = 30 if mesh.get("seq") == 5 else 32  # of the second, shards have an odd number of tokens
    with jax.enable_x64(dtype == "float64"):
        mesh = mesh_for(find_mixer(name).examples[variant], mesh)
        check(mixer_subject(name, variant, dtype), mesh, time, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_every_mesh(family, mesh):
    with jax.enable_x64(True):
        check(family_subject(family, mesh.get("tensor", 1), "float64"), cut(mesh), 30 if mesh.get("seq") == 5 else 32)
