"""Mamba's norms of dt, B and C, against the equations written out in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.mixers import Context, ModelDims, build_mixer
from lcx.params import create, declarations, split

NORMS = {"dt_norm": 2, "B_norm": 4, "C_norm": 4}  # and their widths
# An eps that shows: the mean squares of what is normed are of this size.
DIMS = ModelDims(d_model=32, sublayers=2, norm_eps=0.05)


def build(**options):
    record = {"type": "mamba", "state_size": 4, **options}
    return nnx.merge(*create(lambda: build_mixer("mamba", record, DIMS, nnx.Rngs(0))))


def norm(x, scale):
    """Zhang and Sennrich, arXiv 1910.07467, equation 4."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + DIMS.norm_eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def mamba(p, u, normed):
    """A row u [time, d_model] through Mamba with parameters p (arXiv 2312.00752, algorithm 2): y and the last h."""
    x, z = np.moveaxis(np.tensordot(u, p["in_proj"]["weight"], 1), 1, 0)
    filters, bias = p["conv"]["weight"], p["conv"]["bias"]
    width = filters.shape[1]
    padded = np.concatenate([np.zeros_like(x[: width - 1]), x])
    x = silu(sum(padded[j : j + len(x)] * filters[:, j] for j in range(width)) + bias)
    rank, size = len(p["dt_proj"]), p["A_log"].shape[1]
    dt, B, C = np.split(x @ p["x_proj"]["weight"], [rank, rank + size], axis=-1)
    if normed:
        dt, B, C = (norm(a, p[name]["scale"]) for a, name in zip((dt, B, C), NORMS, strict=True))
    dt = np.logaddexp(0, dt @ p["dt_proj"] + p["dt_bias"])
    h, y = np.zeros_like(p["A_log"]), np.zeros_like(x)
    for t in range(len(x)):
        h = np.exp(-dt[t][:, None] * np.exp(p["A_log"])) * h + (dt[t] * x[t])[:, None] * B[t]
        y[t] = h @ C[t] + p["D"] * x[t]
    return (y * silu(z)) @ p["out_proj"]["weight"], h


@pytest.mark.parametrize("normed", [False, True])
def test_norms_stand_between_x_proj_and_dt_proj(normed):
    graphdef, params = split(build(dt_B_C_norm=normed))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), params)
    u = rng.normal(size=(1, 12, 32)).astype(np.float32)
    positions = np.arange(12, dtype=np.int32)[None]
    context = Context(positions, np.ones_like(positions), np.zeros((1,), np.int32))
    y, state, _ = jax.jit(lambda params: nnx.merge(graphdef, params)(u, None, context))(params)
    # The state tells the scales of B and C apart; to y they are one factor.
    for found, expected in zip(
        (y[0], state["ssm"][0]), mamba(jax.tree.map(np.float64, params), np.float64(u[0]), normed), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_norms_do_not_decay_and_change_no_other_parameter():
    plain, normed = (split(build(dt_B_C_norm=on))[1] for on in (False, True))
    assert {name: normed.pop(name)["scale"].size for name in NORMS} == NORMS
    jax.tree.map(np.testing.assert_array_equal, normed, plain)
    declared = declarations(build(dt_B_C_norm=True))
    assert not any(declared[name]["scale"].decay for name in NORMS)
