"""The suites at sizes that take seconds: that they measure what they say, with and without the peers."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcx.benchmarks import decode, hardware, overhead, peers, rates, scaling, startup
from lcx.benchmarks.harness import Timing
from lcx.benchmarks.models import FAMILIES, make_config, stepper, train_step
from lcx.config import Config
from lcx.planning.accounting import parameter_count
from lcx.training.trainer import make_program

TINY = {"batch_size": 8, "sequence_length": 16, "steps": 8}


def tiny_config(**model):
    mixers = {"mamba": {"type": "mamba", "state_size": 2}}
    model = {"pattern": "mamba", "mixers": mixers, "d_model": 8, "vocab_size": 32} | model
    return Config.from_dict({"model": model, "train": TINY})


def test_a_step_trains():
    step = stepper(make_program(tiny_config()))
    losses = [float(step()) for _ in range(8)]
    assert losses[-1] < losses[0] - 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_size_that_is_asked_for(family):
    config = make_config(family, 2, 64, width=512)
    assert config.model.d_model == 512
    small, large = (parameter_count(make_config(family, 2, 64, width=width).model) for width in (256, 512))
    assert 3.3 < large / small < 4.1  # matrices four times as large, embeddings and vectors twice


def test_the_profile_of_an_accelerator_runs_here_too(tmp_path, monkeypatch):
    sizes = hardware.Sizes(1, 16, 8, 2, 8, 8, jnp.float32, False)
    monkeypatch.setitem(hardware.SIZES, "cpu", sizes)
    results = hardware.hardware_results(tiny_config(), str(tmp_path / "profile"), rounds=1)
    names = [result.name for result in results]
    for what in ("train step", "selective scan", "SSD", "attention"):
        assert any(what in name for name in names), what
    assert all(np.isfinite(result.value) and result.value > 0 for result in results)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_products_are_all_computed():
    call = rates.products([(8, 16), (16, 4), (8, 16)], tokens=32)
    text = call.func.lower(*call.args).compile().as_text()
    flops = call.func.lower(*call.args).compile().cost_analysis()["flops"]
    assert flops >= 3 * 2 * 32 * (8 * 16 + 16 * 4 + 8 * 16), text


def test_tokens_that_are_timed_come_after_the_prompt(monkeypatch):
    monkeypatch.setattr(decode, "COUNT", 3)
    tokens = iter(range(10))
    assert decode.some(tokens) == [0, 1, 2] and decode.some(tokens) == [3, 4, 5]
    whole, part = Timing((10.0, 13.0)), Timing((4.0, 4.0))
    assert decode.difference(whole, part).seconds == (2.0, 3.0)


def test_a_run_and_its_steps_take_turns(monkeypatch):
    """What the run does beside its steps is what shows."""
    monkeypatch.setattr(overhead, "EVERY", 2)
    monkeypatch.setattr(overhead, "TURN", 1)
    program, waits = make_program(tiny_config()), []

    def run(config, folder, turn):
        state = program.create()
        for _ in range(8):
            waits.append(sum(float(jnp.sum(jnp.ones(10))) for _ in range(3)))
            assert turn(state, program) == {}

    (result,) = overhead.overhead_results(run, tiny_config(), rounds=3)
    assert len(waits) == 8 and result.unit == "%" and np.isfinite(result.value)


def test_turns_are_summed_by_rounds_without_the_first():
    assert overhead.by_rounds([9.0] * 5 + [1.0] * 5 + [2.0] * 5).seconds == (5.0, 10.0)


def test_a_run_that_makes_no_step_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "CONFIG", "configs/no_such_file.py")
    with pytest.raises(RuntimeError, match="no_such_file"):
        startup.first_step(tmp_path / "cache", tmp_path / "run")


def test_one_row_and_many_have_the_same_tokens():
    assert np.prod(scaling.MANY) == np.prod(scaling.ONE)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["transformer", "mamba"])
def test_the_peer_has_as_many_parameters_and_learns(family):
    ours = parameter_count(make_config(family, 1, 16).model)
    theirs = sum(parameter.numel() for parameter in peers.build(family).parameters())
    assert ours == theirs
    step, peer = train_step(make_config(family, 1, 16)), peers.train_step(family, 1, 16)
    first = float(step()), peer()
    for _ in range(3):
        last = float(step()), peer()
    assert last[0] < first[0] and last[1] < first[1]
