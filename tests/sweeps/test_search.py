"""Searches: proposals follow from results, and none is lost or made twice when the sweep is killed."""

import pytest

from lcx.errors import UserError
from lcx.schema import build
from lcx.sweeps.expand import expand
from lcx.sweeps.folder import Folder
from lcx.sweeps.run import run
from lcx.sweeps.spec import Sweep
from tests.sweeps.test_sweep import Pretended, write_result

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install 'lcx[sweep]'")

SPACE = {
    "optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "model.mixers.mamba.state_size": {"choices": [4, 8]},
    "optimizer.warmup_steps": {"low": 1, "high": 50, "integer": True},
}


class Scored(Pretended):
    """An attempt whose loss has its minimum at a learning rate of 0.01; with code None it never ends by itself."""

    def __init__(self, folder, trial, code=0):
        super().__init__(folder, trial, code)
        if code == 0:
            rate = trial.config["optimizer"]["learning_rate"]
            write_result(folder, trial.name, trial.config["train"]["steps"], loss=abs(rate - 0.01))


def search(path, started, stop_after=None, code=0, trials=6):
    from lcx.sweeps.search import Searched

    search = {"space": SPACE, "trials": trials}
    configs = {"a": "configs/mamba.py:size=tiny", "b": "configs/mamba.py:size=tiny"}
    sweep = build(Sweep, {"configs": configs, "search": search})
    folder = Folder(path)

    def start(trial):
        started.append(trial)
        return Scored(folder, trial, code)

    stopped = lambda: stop_after is not None and len(started) >= stop_after  # noqa: E731
    with folder.locked():
        source = Searched(sweep, expand(sweep, lambda config, what: 1.0), folder)
        return run(sweep, source, folder, start, 2, stopped, say=lambda text: None)


def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    first, second, whole = [], [], []
    assert search(tmp_path / "killed", first, stop_after=2, code=None).interrupted
    assert len(first) == 2, "two at a time, and they have not ended"
    outcome = search(tmp_path / "killed", second)
    assert [trial.name for trial in second[:2]] == [trial.name for trial in first], "what was proposed is taken up"
    assert len(outcome.finished) == 12 and len({trial.name for trial in second}) == 12
    assert len(search(tmp_path / "whole", whole).finished) == 12
    assert sorted(trial.name for trial in whole) == sorted(trial.name for trial in second)
    again = []
    assert len(search(tmp_path / "whole", again).skipped) == 12 and not again


def test_values_land_in_the_config_and_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    started = []
    search(tmp_path, started, trials=2)
    trial = started[0]
    rate, size = trial.settings["optimizer.learning_rate"], trial.settings["model.mixers.mamba.state_size"]
    assert trial.config["optimizer"]["learning_rate"] == rate and 1e-4 <= rate <= 1e-1 and float(f"{rate:.3g}") == rate
    assert trial.config["model"]["mixers"]["mamba"]["state_size"] == size and size in (4, 8)
    assert trial.name.startswith(f"a-000-learning_rate={rate!r}") and f"state_size={size}" in trial.name


def test_a_search_over_a_field_that_does_not_exist_is_refused():
    search = {"space": {"optimizer.learning_rates": {"low": 0.1, "high": 1.0}}}
    sweep = build(Sweep, {"configs": {"a": "configs/mamba.py:size=tiny"}, "search": search})
    with pytest.raises(UserError, match='unknown key "optimizer.learning_rates": did you mean "learning_rate"'):
        expand(sweep, lambda config, what: 1.0)
