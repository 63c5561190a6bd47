import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.config import OptimizerConfig
from lcx.training.schedules import SCHEDULES, schedule_shape


def values(steps, length=None, **options):
    """The shape at each step of a run of `steps` steps."""
    shape = schedule_shape(OptimizerConfig(**options), steps)
    return np.asarray(jax.jit(jax.vmap(shape))(jnp.arange(length or steps)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_reaches_one(schedule):
    shape = values(100, schedule=schedule, warmup_steps=10)
    np.testing.assert_allclose(shape[:10], np.arange(1, 11) / 10, rtol=1e-6)


def test_cosine_follows_its_formula():
    shape = values(100, schedule="cosine", warmup_steps=20, final_ratio=0.1)
    progress = np.arange(1, 81) / 80
    np.testing.assert_allclose(shape[20:], 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2, atol=1e-6)
    assert shape[-1] == pytest.approx(0.1)


def test_wsd_is_constant_then_one_minus_square_root():
    shape = values(100, schedule="wsd", warmup_steps=10, final_ratio=0.2, decay_fraction=0.25)
    assert (shape[9:75] == 1).all()
    np.testing.assert_allclose(shape[75:], 1 - 0.8 * np.sqrt(np.arange(1, 26) / 25), atol=1e-6)


def test_constant_stays():
    assert (values(50, schedule="constant", warmup_steps=0) == 1).all()


@pytest.mark.parametrize("decay_fraction", [0.0, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 1, 100])
@pytest.mark.parametrize("steps", [1, 3])
def test_short_runs_have_a_positive_rate(warmup_steps, decay_fraction, steps):
    for schedule in SCHEDULES:
        options = {"warmup_steps": warmup_steps, "decay_fraction": decay_fraction, "final_ratio": 0.1}
        shape = values(steps, length=steps + 3, schedule=schedule, **options)
        assert shape.dtype == np.float32
        assert np.isfinite(shape).all() and (shape > 0).all() and (shape <= 1).all()
        assert (shape[steps:] == shape[steps - 1]).all(), "beyond the run the last value holds"
        if warmup_steps == 100:
            assert shape[steps - 1] == 1, "the warm-up is clamped to the run"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dtype_does_not_depend_on_x64(schedule):
    with jax.enable_x64(True):
        shape = jax.eval_shape(schedule_shape(OptimizerConfig(schedule=schedule), 10), jnp.int32(3))
    assert shape.dtype == jnp.float32 and not shape.weak_type
