"""`make parity`: lcx beside implementations that no one here wrote. Nothing is downloaded; all weights are random."""

import importlib.util
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # no advice to install kernels for GPUs

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
LINES = pytest.StashKey[list[str]]()


def pytest_ignore_collect(config):
    """Where parity is left out, or its libraries are missing, its modules are not read: all import torch.

    Where it is asked for, a missing library is an error.
    """
    left_out = "not parity" in config.option.markexpr
    if MISSING and not left_out and "parity" in config.option.markexpr:
        raise pytest.UsageError(f"not installed: {', '.join(MISSING)}; pip install -e '.[test,parity]', or make parity")
    return True if MISSING or left_out else None


# Of the kernels' tests in Triton's interpreter, where a launch takes a tenth of a second and more, those that
# `make parity` runs: values and gradients of every kind of call. The rest are `slow`: `make interpret`, and on a GPU.
INTERPRETED = ("triton_interpreter", "chunked_memory_triton", "attention_triton", "triton_conv")
FIRST = (
    "test_float64",
    "test_bfloat16",
    "test_lower_precisions",
    "test_results_and_gradients",
    "test_gradients_of_parts",
    "test_against_the_loop",
    "test_memory_traffic",
    "test_memory_traffic_is_as_counted",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in INTERPRETED and item.originalname not in FIRST:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def say(request):
    """say(text): a line for the end of the run, with what was measured."""
    return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter, config):
    if MISSING and "not parity" not in config.option.markexpr:
        terminalreporter.line(f"tests/parity is left out: not installed: {', '.join(MISSING)}")
    if lines := config.stash.get(LINES, []):
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)
