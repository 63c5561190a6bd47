"""The train step: one token-weighted loss, however the batch is cut, accumulated or placed on a mesh."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lcx.config import MESH_AXES, Config, load_config
from lcx.errors import UserError
from lcx.laws.measure import deviation
from lcx.models import LanguageModel
from lcx.models.cross_entropy import token_losses
from lcx.parallel.mesh import make_mesh
from lcx.params import create
from lcx.training.train_step import batch_hash, collect, histograms
from lcx.training.trainer import make_program

ROWS, TIME = 8, 24
MIXED_MESH = {"data": 1, "fsdp": 2, "seq": 2, "tensor": 2}
MESHES = {
    "seq=8": {"data": 1, "seq": 8},
    "seq=4,tensor=2": {"data": 1, "seq": 4, "tensor": 2},
    "data=2,fsdp=2,seq=2": {"data": 2, "fsdp": 2, "seq": 2},
    "data=8": {"data": 8},
    "fsdp=8": {"data": 1, "fsdp": 8},
    "tensor=4": {"data": 1, "tensor": 4},
}
SINK_TOKEN = "sink:form=token,window=5"


def config(family: str = "samba", **sections) -> Config:
    file, _, options = family.partition(":")
    values = load_config(f"configs/{file}.py:{options}").to_dict()
    values["model"] |= {"d_model": 32, "vocab_size": 64}
    values["model"]["mixers"].get("swa", {}).update({"num_heads": 4, "num_kv_heads": 4, "window": 5})
    values["model"]["mixers"].get("infini", {}).update({"num_heads": 4, "segment_length": 4})
    values["model"]["mixers"].get("attention", {}).update({"num_heads": 4})
    values["model"]["mixers"]["mlp"]["d_ff"] = 48
    values["train"] |= {"batch_size": ROWS, "sequence_length": TIME, "steps": 10}
    values["mesh"] = {"data": 1}
    for section, changes in sections.items():
        values[section] |= changes
    return Config.from_dict(values)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Rows of two documents; whole rows, and a whole half of the batch's shards, hold no token that counts."""
    random = np.random.default_rng(0)
    positions = np.concatenate([np.arange(10), np.arange(TIME - 10)])[None].repeat(ROWS, 0).astype(np.int32)
    weights = random.integers(0, 2, (ROWS, TIME)).astype(np.float32) * random.choice([1.0, 0.5], (ROWS, TIME))
    weights[:2] = 0
    weights[6] = 0
    return {
        "tokens": random.integers(0, 64, (ROWS, TIME), np.int32),
        "targets": random.integers(0, 64, (ROWS, TIME), np.int32),
        "segment_ids": np.where(np.arange(TIME) < 10, 1, 2)[None].repeat(ROWS, 0).astype(np.int32),
        "positions": positions,
        "loss_weights": weights.astype(np.float32),
        "row_index": np.arange(ROWS, dtype=np.int32),
    }


def stepper(config: Config) -> Callable[[dict], tuple[dict, dict]]:
    """What gives parameters and metrics after one step on a batch, compiled once.

    It runs on the mesh of the config, over as many devices as it names.
    """
    count = math.prod(getattr(config.mesh, axis) for axis in MESH_AXES)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:count]))
    step = jax.jit(program.step)

    def run(batch: dict) -> tuple[dict, dict]:
        with program.on_mesh():
            state, metrics = step(program.create(), program.put(batch))
        return jax.device_get(state.params), jax.device_get(metrics)

    return run


def one_step(config: Config, batch: dict) -> tuple[dict, dict]:
    return stepper(config)(batch)


@pytest.fixture(scope="module")
def step() -> Callable[[dict], tuple[dict, dict]]:
    return stepper(config())


@pytest.fixture(scope="module")
def whole(step, batch) -> tuple[dict, dict]:
    return step(batch)


def compare(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    """Losses and gradient norms to 1e-6; AdamW's first step is the gradient's sign, so its parameters to 1e-4."""
    np.testing.assert_allclose(found[1]["loss"], expected[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(found[1]["grad_norm"], expected[1]["grad_norm"], rtol=1e-5)
    assert found[1]["tokens"] == expected[1]["tokens"] and found[1]["batch_hash"] == expected[1]["batch_hash"]
    difference = deviation({"params": found[0]}, {"params": expected[0]})
    assert difference.value < 1e-4, difference


def test_loss_is_the_weighted_mean(batch, whole):
    c = config()
    graphdef, params = create(lambda: LanguageModel(c.model, nnx.Rngs(c.train.seed)))

    @jax.jit
    def predict(params):
        logits, _, _ = nnx.merge(graphdef, params)(batch["tokens"], None, batch["positions"], batch["segment_ids"])
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    log_probabilities = predict(params)
    losses = -np.take_along_axis(np.asarray(log_probabilities), batch["targets"][..., None], -1)[..., 0]
    expected = (losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    np.testing.assert_allclose(whole[1]["loss"], expected, rtol=1e-5)
    assert whole[1]["tokens"] == (batch["loss_weights"] > 0).sum()


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_accumulation_changes_nothing(batch, whole, accumulate):
    compare(one_step(config(train={"accumulate": accumulate}), batch), whole)


def test_a_mixed_mesh_changes_nothing(batch, whole):
    compare(one_step(config(mesh=MIXED_MESH), batch), whole)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.mesh
@pytest.mark.slow
def test_every_mesh_changes_nothing(batch, whole, mesh):
    compare(one_step(config(mesh=mesh), batch), whole)


@pytest.mark.parametrize("family", ["transformer", "infini", "infini:update=segment_delta", "sink", SINK_TOKEN])
@pytest.mark.mesh
@pytest.mark.slow
def test_a_mixed_mesh_changes_nothing_in_other_families(batch, family):
    expected, found = (one_step(config(family, mesh=mesh), batch) for mesh in ({"data": 1}, MIXED_MESH))
    compare(found, expected)


def test_gates_learn_at_their_own_rate_and_are_shown(batch):
    """AdamW's first step is the learning rate times the gradient's sign: 0.01 for gates, whatever the model's is."""
    optimizer = {"learning_rate": 1e-4, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.1}
    params, metrics = one_step(config("infini", optimizer=optimizer), batch)
    gates = params["stack"]["layers"]["0_infini"]["mixers"]["infini"]["gate"]
    np.testing.assert_allclose(np.abs(gates), 0.01, rtol=1e-2)  # from 0, up or down
    shown = metrics["histograms"]
    assert set(shown) == {f"0_infini/infini/{name}/histogram" for name in ("gate", "memory_norm")}
    np.testing.assert_allclose(shown["0_infini/infini/gate/histogram"], np.full((4, 4), 0.5))  # [periods, heads]
    np.testing.assert_allclose(metrics["0_infini/infini/gate"], 0.5)
    np.testing.assert_allclose(
        metrics["0_infini/infini/memory_norm"], shown["0_infini/infini/memory_norm/histogram"].mean(), rtol=1e-5
    )


def test_a_batch_without_a_token_that_counts_moves_nothing_but_decay(batch, step):
    nothing = batch | {"loss_weights": np.zeros_like(batch["loss_weights"])}
    _, metrics = step(nothing)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_z_loss_adds_the_squared_log_denominator(batch):
    """With a weight so large that it dominates, the gradient is that of the mean squared log denominator."""
    c = config(model={"pattern": "mlp"}, train={"z_loss": 1e4})
    graphdef, params = create(lambda: LanguageModel(c.model, nnx.Rngs(c.train.seed)))

    def squared(params):
        logits, _, _ = nnx.merge(graphdef, params)(batch["tokens"], None, batch["positions"], batch["segment_ids"])
        weights = batch["loss_weights"] / batch["loss_weights"].sum()
        return 1e4 * (weights * jax.nn.logsumexp(logits, axis=-1) ** 2).sum()

    expected = jax.jit(lambda params: optax.tree.norm(jax.grad(squared)(params)))(params)
    _, metrics = one_step(c, batch)
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 5, 24, 100])
def test_chunks_of_the_loss_are_the_whole_loss(chunk_size):
    """Any chunk, ragged ones included, gives the losses of full logits, and their gradient."""
    random = np.random.default_rng(0)
    hidden, table = (random.normal(size=shape).astype(np.float32) for shape in ((2, 13, 6), (11, 6)))
    targets = random.integers(0, 11, (2, 13), np.int32)
    weights = np.arange(26, dtype=np.float32).reshape(2, 13)

    def chunked(hidden, table):
        losses, log_denominators = token_losses(table, hidden, targets, chunk_size)
        return jnp.sum(weights * (losses + 0.1 * log_denominators**2))

    def full(hidden, table):
        log_denominators = jax.nn.logsumexp(hidden @ table.T, axis=-1)
        losses = log_denominators - jnp.take_along_axis(hidden @ table.T, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * (losses + 0.1 * log_denominators**2))

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, table) for f in (chunked, full))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_products_of_the_loss_are_of_the_compute_dtype():
    """In bfloat16 the scores' gradient is float32, and so would be both products that it enters."""
    hidden, table = jnp.zeros((2, 8, 16), jnp.bfloat16), jnp.zeros((32, 16), jnp.float32)
    loss = lambda *arrays: token_losses(*arrays, jnp.zeros((2, 8), jnp.int32), 4)[0].sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).lower(table, hidden).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3  # scores and two gradients
    for line in products:
        operands = line[line.rindex(": (") :].split("->")[0]
        assert operands.count("bf16>") == 2, line


def test_the_hash_sees_every_integer_of_a_batch(batch):
    find = jax.jit(batch_hash)
    reference = int(find(batch))
    for name in ("tokens", "segment_ids", "positions", "row_index"):
        changed = batch[name].copy()
        changed.flat[-1] += 1
        assert int(find(batch | {name: changed})) != reference, name
    swapped = batch["tokens"][::-1].copy()
    assert int(find(batch | {"tokens": swapped})) != reference


def test_metrics_of_mixers_are_named_by_layer():
    aux = {
        "0_mamba": {"mamba": {"metrics": {"rms": jnp.array([1.0, 3.0])}, "losses": {"extra": jnp.array([1.0, 3.0])}}}
    }
    assert {name: float(value) for name, value in collect(aux, "metrics").items()} == {"0_mamba/mamba/rms": 2.0}
    assert {name: float(value) for name, value in collect(aux, "losses").items()} == {"0_mamba/mamba/extra": 4.0}
    assert histograms(aux) == {}


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"mesh": {"data": 3}}, "does not fill the 8 visible devices"),
        ({"mesh": {"data": -1}, "train": {"batch_size": 6}}, "train.batch_size=6 does not divide over 8 devices"),
        ({"mesh": {"data": 2, "tensor": 4}, "model": {"d_model": 30}}, "num_heads"),
        (
            {"mesh": {"data": 1, "fsdp": 8}, "model": {"d_model": 36, "pattern": "mlp"}},
            "d_model=36, which does not divide over the 8 devices of mesh.fsdp",
        ),
        (
            {"mesh": {"data": 1, "seq": 8}, "train": {"sequence_length": 20}},
            "train.sequence_length=20 does not divide over mesh.seq=8",
        ),
        (
            {"mesh": {"data": 1, "seq": 8}, "model": {"remat": {"mlp": "time:8"}}},
            'model.remat.mlp="time:8" goes through time chunk by chunk, which mesh.seq=8 cuts over devices',
        ),
    ],
)
def test_what_a_mesh_cannot_divide_is_named(sections, message):
    with pytest.raises(UserError, match=message):
        make_program(config(**sections))
