"""Every shipped size and variant, built abstractly: the counts of tests/configs, summed over the model's leaves."""

import pytest

from lcx.params import count_parameters
from lcx.training.train_state import blueprint
from tests.configs.test_sizes import COUNTS, TINY, VARIANTS, config_of


@pytest.mark.parametrize("name", COUNTS | VARIANTS)
def test_parameter_count(name):
    assert count_parameters(blueprint(config_of(name)).shapes) == (COUNTS | VARIANTS)[name]


@pytest.mark.parametrize("name", TINY)
def test_tiny_is_tiny(name):
    assert count_parameters(blueprint(config_of(name)).shapes) < 2_000_000
