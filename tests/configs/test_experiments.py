"""The experiments' configs and sweeps: models of equal size, and every run of a sweep can be built."""

import importlib.util
from pathlib import Path

import pytest

from lcx.config import Config, load_config
from lcx.evaluation.suites import read_options
from lcx.params import count_parameters
from lcx.training.train_state import blueprint

CONFIGS = Path(__file__).parents[2] / "configs"


def sweep(name: str) -> dict:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / "sweeps" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_sweep()


@pytest.mark.parametrize("name", ["long_context", "recall"])
def test_every_run_of_a_sweep_can_be_built(name):
    for argument in sweep(name)["configs"].values():
        config = Config.from_dict(load_config(CONFIGS.parent / argument))
        for suite in config.evaluation.suite_names:
            read_options(suite, config.evaluation.options[suite])


def test_six_models_of_one_size():
    counts = [
        count_parameters(blueprint(Config.from_dict(load_config(CONFIGS.parent / argument))).shapes)
        for argument in sweep("long_context")["configs"].values()
    ]
    assert len(counts) == 6 and max(counts) - min(counts) < 0.005 * min(counts)
