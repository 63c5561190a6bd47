"""Mamba-2 against its reading, how it starts, what it refuses, and groups of heads on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from lcx import laws
from lcx.config import load_config
from lcx.errors import UserError
from lcx.laws.measure import deviation
from lcx.laws.subject import spread
from lcx.mixers import MIXERS, Context, ModelDims, build_mixer
from lcx.models import LanguageModel
from lcx.parallel.sharding import parameter_shardings
from lcx.params import create, declarations
from tests.readings import of_lcx
from tests.readings.mamba2 import mamba2

D = 16
DIMS = ModelDims(D, sublayers=2, param_dtype=jnp.float64, compute_dtype=jnp.float64, norm_eps=0.05)  # an eps that shows
OPTIONS = {"head_dim": 4, "state_size": 3, "chunk_size": 4}


@pytest.mark.parametrize("groups, limit", [(2, (0.3, 0.6)), pytest.param(1, None, marks=pytest.mark.slow)])
def test_the_reading_of_the_paper(groups, limit):
    """Outputs and states of packed documents; with a limit that clips steps at both ends."""
    positions = np.concatenate([np.arange(size) for size in (7, 1, 10)]).astype(np.int32)
    x = np.random.default_rng(0).normal(size=(1, len(positions), D))
    with jax.enable_x64(True):
        record = {"type": "mamba2", "num_groups": groups, "dt_limit": limit} | OPTIONS
        graphdef, params = create(lambda: build_mixer("mine", record, DIMS, nnx.Rngs(0)))
        params = spread(params)
        params["dt_bias"] = params["dt_bias"] + 4  # steps that matter
        context = Context(jnp.asarray(positions)[None], jnp.ones((1, 18), jnp.int32), jnp.zeros((1,), jnp.int32))
        y, state, _ = jax.jit(lambda params: nnx.merge(graphdef, params)(x, None, context))(params)
    bounds = limit or (0, np.inf)
    weights, eps = of_lcx.mamba2(params), DIMS.norm_eps
    expected, left = mamba2(x[0], weights, num_groups=groups, positions=positions, dt_limit=bounds, norm_eps=eps)
    found = {"y": y[0], "ssm": np.swapaxes(state["ssm"][0], 1, 2)}
    distance = deviation(found, {"y": expected, "ssm": left})
    assert distance.value < 1e-9, distance


def test_it_starts_as_the_paper_does():
    record, dims = {"type": "mamba2", "head_dim": 2}, ModelDims(1024, sublayers=8)
    mixer = nnx.merge(*create(lambda: build_mixer("mine", record, dims, nnx.Rngs(0))))
    rate, step = np.exp(mixer.A_log[...]), np.log1p(np.exp(mixer.dt_bias[...]))
    assert rate.shape == step.shape == (1024,)
    assert 1 <= rate.min() < 1.2 and 15.8 < rate.max() <= 16.0001 and abs(rate.mean() - 8.5) < 0.5  # uniform in A
    assert 0.00099 < step.min() < 0.0011 and 0.09 < step.max() < 0.1001
    assert abs(np.log(step).mean() - np.log(0.01)) < 0.15  # uniform in log dt
    np.testing.assert_array_equal(mixer.D[...], 1)
    largest = {name: np.abs(np.asarray(getattr(mixer, name).weight[...])).max() for name in ("z_x_proj", "out_proj")}
    assert largest == pytest.approx({"z_x_proj": 1 / 32, "out_proj": 1 / np.sqrt(2048 * 8)}, rel=0.01)
    undecayed = {name for name, entry in declarations(mixer).items() if not getattr(entry, "decay", True)}
    assert undecayed == {"dt_bias", "A_log", "D", "norm_scale"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_dim": 24}, "head_dim=24 does not divide the inner width"),
        ({"head_dim": 8, "num_groups": 3}, "num_groups=3 does not divide the 8 heads"),
        ({"head_dim": 8, "dt_limit": (0.1, 0.01)}, "must be the lower and the upper limit"),
        ({"head_dim": 8, "backend": "tritn"}, "backend: unknown name 'tritn'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=f"model.mixers.mine: .*{message}"):
        build_mixer("mine", {"type": "mamba2"} | options, ModelDims(32, sublayers=2), nnx.Rngs(0))


def mesh_of(**sizes):
    shape = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1} | sizes
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 4, devices=devices)


def test_groups_follow_their_heads_on_any_mesh():
    """Eight heads in two groups over four devices: each group is needed by two of them."""
    options = {"head_dim": 8, "state_size": 4, "num_groups": 2, "conv_width": 2, "backend": "reference"}
    with jax.enable_x64(True):
        subject = laws.mixer_subject("mamba2", MIXERS["mamba2"], options, "float64")
        packing = dict(first_positions=[3, 0], lengths=[7, 0], padding=[0, 1], seed=0)
        chunk = laws.pack(subject, rows=[[12], [4, 1, 7]], **packing)
        arguments = (chunk.x, chunk.state, chunk.context, chunk.dy, chunk.dstate)
        expected = subject.pull(*arguments)
        with jax.set_mesh(mesh_of(data=2, tensor=4)):
            found = subject.pull(*arguments)
    difference = deviation(dataclasses.asdict(found), dataclasses.asdict(expected))
    assert difference.value < laws.TOLERANCE["float64"], difference


def shardings(head_dim, groups):
    """Of a Mamba-2 with 64 channels, over two devices of fsdp and four of tensor."""
    record = {"type": "mamba2", "head_dim": head_dim, "num_groups": groups}
    mixer = nnx.eval_shape(lambda: build_mixer("mine", record, ModelDims(32, sublayers=2), nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    return parameter_shardings(shapes, declarations(mixer), mesh_of(fsdp=2, tensor=4))


@pytest.mark.parametrize("groups, part", [(8, "tensor"), (1, None)])
def test_groups_that_do_not_divide_are_whole(groups, part):
    found = shardings(8, groups)
    assert found["B_C_proj"]["weight"].spec == jax.sharding.PartitionSpec("fsdp", None, part, None)
    assert found["z_x_proj"]["weight"].spec == jax.sharding.PartitionSpec("fsdp", None, "tensor", None)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="heads=2, which does not divide over the 4 devices of mesh.tensor"):
        shardings(32, 1)


@pytest.mark.slow
def test_in_the_place_of_mamba_in_a_hybrid():
    """SAMBA with Mamba-2: a text read in two chunks has the logits of the whole."""
    model = load_config("configs/samba.py:size=tiny").model
    with model.unlocked():
        model.mixers.mamba = {"type": "mamba2", "head_dim": 16, "state_size": 8, "num_groups": 2, "chunk_size": 8}
        model.mixers.swa.window = 7
    model.update(d_model=32, periods=1)
    graphdef, params = create(lambda: LanguageModel(model, nnx.Rngs(0)))
    run = jax.jit(lambda tokens, state: nnx.merge(graphdef, params)(tokens, state)[:2])
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24), np.int32)
    empty = nnx.merge(graphdef, params).init_state(2, 24)
    whole, _ = run(tokens, empty)
    first, state = run(tokens[:, :12], empty)
    second, _ = run(tokens[:, 12:], state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)
    assert state["layers"]["0_mamba"]["mamba"]["ssm"].shape == (1, 2, 4, 8, 16)
