"""Training from carried states: every step goes on where its rows stopped, and nothing else does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cli.load import load
from lcx.cli.train import train
from lcx.config import Config, MeshConfig, load_config
from lcx.data import batch as read_batch
from lcx.errors import UserError
from lcx.models.cross_entropy import token_losses
from lcx.parallel.mesh import abstract_mesh, make_mesh
from lcx.training.carried_state import cut, join
from lcx.training.trainer import make_program

ROWS, TIME = 4, 16


def make(tmp_path, *, mesh=None, family="samba", corpus=None, **train):
    values = load_config(f"configs/{family}.py").to_dict()
    values["model"] |= {"d_model": 32, "periods": 1}
    if family == "samba":
        values["model"]["pattern"] = "mamba swa"
    for name, changes in {"swa": {"num_heads": 4, "num_kv_heads": 4, "window": 5}, "mlp": {"d_ff": 48}}.items():
        values["model"]["mixers"].get(name, {}).update(changes)
    if corpus is None:
        corpus = tmp_path / "corpus"
        if not corpus.exists():
            corpus.mkdir()
            random = np.random.default_rng(0)
            for i, size in enumerate((300, 40, 7, 150)):
                (corpus / f"{i}").write_bytes(bytes(random.integers(32, 127, size).tolist()))
    values["data"] |= {"sources": [{"name": "test", "path": str(corpus)}], "workers": 0}
    values["train"] |= {"batch_size": ROWS, "sequence_length": TIME, "steps": 6, "carry_state": True} | train
    values["optimizer"] |= {"learning_rate": 0.0}  # so that losses of different steps are of the same model
    values["mesh"] = mesh or {"data": 1}
    values["evaluation"]["max_rows"] = 4
    values["logging"] |= {"every": 1, "tensorboard": False}
    return Config.from_dict(values)


def make_row_losses(program):
    """(parameters, batches) -> the loss of each batch, where the rows of all batches are one long row."""

    @jax.jit
    def losses_of(params, joined):
        model = program.blueprint.model(params)
        hidden, _, _ = model.hidden(joined["tokens"], None, joined["positions"])
        return token_losses(model.output_table, hidden, joined["targets"], 1024)[0] * joined["loss_weights"]

    def row_losses(params, batches):
        names = [name for name in batches[0] if name != "row_index"]
        joined = {name: np.concatenate([one[name] for one in batches], axis=1) for name in names}
        weighted = np.asarray(losses_of(params, joined))
        pieces = [slice(i * TIME, (i + 1) * TIME) for i in range(len(batches))]
        return [weighted[:, at].sum() / joined["loss_weights"][:, at].sum() for at in pieces]

    return row_losses


def test_a_step_goes_on_where_its_rows_stopped(tmp_path):
    """On a mesh, with rows and time cut over devices, and a batch in two pieces."""
    mesh = {"data": 2, "seq": 2}
    config = make(tmp_path, mesh=mesh, accumulate=2)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:4]))
    batches = [read_batch(config, i) for i in range(4)]
    assert sum(one["positions"][:, 0].astype(bool).sum() for one in batches) > 4
    found = []
    with program.on_mesh():
        step = jax.jit(program.step)
        fresh = state = program.create()
        for one in batches:
            state, metrics = step(state, program.put(one))
            found.append(float(metrics["loss"]))
        following = program.put(read_batch(config, 5))

        def loss_at(start, index):
            at = jax.device_put(np.int32(index), start.data_index.sharding)
            return float(step(dataclasses.replace(start, data_index=at), following)[1]["loss"])

        # What is carried over a skipped index is forgotten, and only then.
        assert loss_at(state, 5) == loss_at(fresh, 5) != loss_at(state, 4)
    params = jax.device_get(state.params)
    row_losses = make_row_losses(program)
    expected = row_losses(params, batches)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    alone = [row_losses(params, [one])[0] for one in batches]
    assert abs(alone[0] - expected[0]) < 1e-4 and max(abs(a - b) for a, b in zip(alone, expected, strict=True)) > 1e-4


def test_cutting_and_joining_rows_are_inverse():
    state = {"position": jnp.arange(6), "length": jnp.arange(6), "layers": {"a": jnp.arange(60).reshape(2, 6, 5)}}
    pieces = cut(state, 3)
    assert pieces["position"].tolist() == [[0, 3], [1, 4], [2, 5]] and pieces["layers"]["a"].shape == (3, 2, 2, 5)
    assert jax.tree.all(jax.tree.map(np.array_equal, join(pieces), state))


def test_states_that_grow_are_refused(tmp_path):
    with pytest.raises(UserError, match='the state of the mixer "attention" grows with every token'):
        make_program(make(tmp_path, family="transformer"), abstract_mesh(MeshConfig(data=1)))


@pytest.mark.slow
def test_stages_and_carried_states_survive_a_stop(tmp_path):
    """Two stages of other lengths, batch sizes and positions; stopped and gone on with at and around the border."""
    stages = [{"step": 3, "sequence_length": 8, "batch_size": 2, "rope_base": 500.0}]
    config = make(tmp_path, mesh={"data": 2, "tensor": 4}, stages=stages).to_dict()
    config["optimizer"] |= {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
    for steps in (2, 3, 4, 6):
        train(config | {"train": config["train"] | {"steps": steps}}, str(tmp_path / "parts"))
    train(config, str(tmp_path / "whole"))
    wanted = ("step", "data_index", "loss", "batch_hash", "grad_norm")
    lines = {}
    for name in ("parts", "whole"):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [{key: json.loads(line)[key] for key in wanted} for line in text.splitlines()]
    assert lines["parts"] == lines["whole"] and len(lines["parts"]) == 6
    model, _ = load(tmp_path / "parts")
    bases = [
        m.options.rope_base for layer in model.stack.layers.values() for n, m in layer.mixers.items() if n == "swa"
    ]
    assert bases == [500.0]
