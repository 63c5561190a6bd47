"""The MFU that a run logs, by hand."""

from dataclasses import replace

import jax
import pytest

from lcx.cli import run
from lcx.config import Config, load_config
from lcx.training.trainer import make_programs

PEAK = 1e12


def programs(*, window=None, stages=()):
    config = load_config("configs/transformer.py:size=tiny,sequence_length=512")
    config.train.stages = list(stages)
    if window:
        config.model.mixers.attention["window"] = window
    return make_programs(Config.from_dict(config))


def by_hand(config, pairs):
    """FLOPs of a document: matrices, logits, and pairs of tokens that see each other."""
    model, tokens = config.model, config.train.sequence_length
    heads, d_ff = model.mixers["attention"], model.mixers["mlp"]["d_ff"]
    width = model.d_model // heads["num_heads"]
    kv_heads = heads["num_kv_heads"] or heads["num_heads"]
    attention = 2 * model.d_model * width * (2 * heads["num_heads"] + 2 * kv_heads)
    weights = attention + 6 * model.d_model * d_ff
    return tokens * (model.periods * weights + 2 * model.d_model * model.vocab_size) + (
        model.periods * pairs * 4 * width * heads["num_heads"]
    )


@pytest.fixture
def known_peak(monkeypatch):
    monkeypatch.setattr(run, "peak_flops", lambda kind, dtype: PEAK if (kind, dtype) == ("cpu", "float32") else None)


@pytest.mark.parametrize("window, pairs", [(None, 512 * 513 // 2), (100, 100 * 101 // 2 + 412 * 100)])
def test_model_flops_over_the_peak_of_all_devices(known_peak, window, pairs):
    (program,) = programs(window=window)
    expected = 3 * by_hand(program.config, pairs) / 512 * 1000 / (jax.device_count() * PEAK)
    assert run.Utilisation()(program, 1000.0) == pytest.approx(expected, rel=1e-12)


def test_remat_does_not_count(known_peak):
    (program,) = programs()
    config = program.config
    (again,) = make_programs(replace(config, model=replace(config.model, remat={"mlp": "full", "attention": "full"})))
    assert run.Utilisation()(again, 1e3) == run.Utilisation()(program, 1e3)


def test_each_stage_has_its_own(known_peak):
    first, second = programs(stages=[{"step": 5, "sequence_length": 1024}])
    used = run.Utilisation()
    assert used(second, 1e3) > used(first, 1e3) > 0  # longer documents, more pairs a token


def test_a_stage_is_counted_once(known_peak, monkeypatch):
    (program,) = programs()
    used = run.Utilisation()
    first = used(program, 1e3)
    monkeypatch.delattr(type(program.blueprint), "model")  # which costs as much as a line of logs
    assert used(program, 2e3) == pytest.approx(2 * first)


def test_no_peak_no_utilisation():
    (program,) = programs()
    assert run.Utilisation()(program, 1e3) is None
