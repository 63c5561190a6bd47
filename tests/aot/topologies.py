"""Meshes of chips that are not here, to compile for. A mesh has two devices along each of data, seq and tensor."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

AXES = ("data", "seq", "tensor")
TPUS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}


def tpu_mesh(chip: str) -> Mesh:
    """Eight chips of a kind of ``TPUS``; skips the test where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU, is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no question to a TPU machine's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: processes may compile side by side
    return mesh_of(topologies.get_topology_desc(TPUS[chip], platform="tpu").devices)


def mesh_of(devices: list[jax.Device]) -> Mesh:
    """Eight devices as a mesh."""
    return Mesh(np.array(devices).reshape(2, 2, 2), AXES)
