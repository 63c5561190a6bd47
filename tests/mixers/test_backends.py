"""A mixer computes the same with every backend of its kernels, gradients included, also on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lcx import laws
from lcx.laws.measure import deviation
from lcx.laws.subject import Pull
from lcx.mixers import MIXERS
from lcx_kernels.backends import interpreted

MESHES = {"one_device": {}, "mesh": {"data": 2, "tensor": 2}}
OPTIONS = {
    "mamba": {"state_size": 4},
    "mamba2": {"head_dim": 16, "state_size": 4, "conv_width": 2, "chunk_size": 8},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "window": 5, "sink_tokens": 1, "sink": "logit"},
    "infini": {"num_heads": 4, "num_kv_heads": 2, "segment_length": 4, "update": "segment_delta"},
}
CASES = [(name, "reference") for name in OPTIONS] + [("mamba", "pallas_tpu"), ("mamba", "cpp"), ("attention", "cpp")]


@functools.cache
def pull(name: str, backend: str, mesh: str) -> Pull:
    sizes = MESHES[mesh]
    subject = laws.mixer_subject(name, MIXERS[name], OPTIONS[name] | {"backend": backend}, "float64")
    packing = dict(first_positions=[3, 0], lengths=[7, 0], padding=[0, 1], seed=0)
    chunk = laws.pack(subject, rows=[[20], [6, 1, 13]], **packing)
    shape = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1} | sizes
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 4, devices=devices)
    with jax.set_mesh(mesh):
        return subject.pull(chunk.x, chunk.state, chunk.context, chunk.dy, chunk.dstate)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name, backend", CASES)
def test_backends_agree(name, backend, mesh):
    with jax.enable_x64(True):
        expected = pull(name, "xla", "one_device")
        with interpreted():
            found = pull(name, backend, mesh)
    difference = deviation(dataclasses.asdict(found), dataclasses.asdict(expected))
    assert difference.value < laws.TOLERANCE["float64"], difference
