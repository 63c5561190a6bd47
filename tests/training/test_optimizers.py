import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcx.config import OptimizerConfig
from lcx.params import Declaration
from lcx.training.optimizers import make_optimizer
from lcx.training.schedules import schedule_shape

STEPS = 8
CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, weight_decay=0.5, clip_norm=2.0)
DECLARATIONS = {
    "block": {"matrix": Declaration(axes=(None, None)), "bias": Declaration(axes=(None,), decay=False)},
    "gate": Declaration(axes=(), decay=False, learning_rate=0.3, absolute=True),
    "slow": Declaration(axes=(None,), learning_rate=0.1),
}
PEAKS = {"block": {"matrix": 1e-2, "bias": 1e-2}, "gate": 0.3, "slow": 1e-3}
DECAYS = {"block": {"matrix": 0.5, "bias": 0.0}, "gate": 0.0, "slow": 0.5}


def draw(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"block": {"matrix": (3, 4), "bias": (4,)}, "gate": (), "slow": (5,)}
    return jax.tree.map(lambda s: np.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def run(config, parameters, steps=STEPS):
    """The parameters after each of the first steps of a run of STEPS."""
    optimizer = make_optimizer(config, STEPS, DECLARATIONS)
    parameters = jax.tree.map(jnp.asarray, parameters)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, gradients):
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    history = []
    for index in range(steps):
        parameters, state = step(parameters, state, draw(index + 1))
        history.append(parameters)
    return history, state


def numpy_adamw(parameters, config):
    """AdamW in float64, written from the paper: clipping, moments, bias correction, decoupled decay."""
    shape = schedule_shape(config, STEPS)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x.astype(np.float64), parameters))
    peaks, decays = jax.tree.leaves(PEAKS), jax.tree.leaves(DECAYS)
    first, second = [np.zeros_like(x) for x in leaves], [np.zeros_like(x) for x in leaves]
    for step in range(1, STEPS + 1):
        gradients = [g.astype(np.float64) for g in jax.tree.leaves(draw(step))]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        for i, gradient in enumerate(gradients):
            gradient = gradient * min(1.0, config.clip_norm / norm)
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            direction = (first[i] / (1 - 0.9**step)) / (np.sqrt(second[i] / (1 - 0.95**step)) + 1e-8)
            rate = float(shape(step - 1)) * peaks[i]
            leaves[i] = leaves[i] - rate * direction - rate * decays[i] * leaves[i]
        yield jax.tree.unflatten(tree, leaves)


def test_equals_adamw_written_from_the_paper():
    parameters = draw(0)
    history, _ = run(CONFIG, parameters)
    for ours, golden in zip(history, numpy_adamw(parameters, CONFIG), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, golden)


def test_equals_lion_written_from_the_paper():
    config = dataclasses.replace(CONFIG, name="lion", clip_norm=1e9)
    history, _ = run(config, draw(0))
    shape = schedule_shape(config, STEPS)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x.astype(np.float64), draw(0)))
    momenta = [np.zeros_like(x) for x in leaves]
    for step, ours in enumerate(history, start=1):
        for i, gradient in enumerate(g.astype(np.float64) for g in jax.tree.leaves(draw(step))):
            direction = np.sign(0.9 * momenta[i] + 0.1 * gradient) + jax.tree.leaves(DECAYS)[i] * leaves[i]
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            leaves[i] = leaves[i] - float(shape(step - 1)) * jax.tree.leaves(PEAKS)[i] * direction
        golden = jax.tree.unflatten(tree, leaves)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, golden)


def test_decay_acts_only_where_declared_unless_everywhere():
    def moved_by_decay(**options):
        config = dataclasses.replace(CONFIG, **options)
        (with_decay,), _ = run(config, draw(0), steps=1)
        (without,), _ = run(dataclasses.replace(config, weight_decay=0.0), draw(0), steps=1)
        return jax.tree.map(lambda a, b: bool((a != b).any()), with_decay, without)

    assert moved_by_decay() == {"block": {"matrix": True, "bias": False}, "gate": False, "slow": True}
    assert all(jax.tree.leaves(moved_by_decay(decay_all=True)))


def test_absolute_learning_rate_does_not_follow_the_configured_peak():
    """Adam's first update is rate * sign(gradient); at step 0 of a warm-up of 3 the shape is 1/3."""
    for peak in (1e-2, 1e-4):
        config = dataclasses.replace(CONFIG, learning_rate=peak, weight_decay=0.0)
        before = draw(0)
        (after,), _ = run(config, before, steps=1)
        rates = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after, before)
        assert rates["gate"] == pytest.approx(0.3 / 3, rel=1e-3)
        assert rates["block"]["matrix"] == pytest.approx(peak / 3, rel=1e-2)
        assert rates["slow"] == pytest.approx(0.1 * peak / 3, rel=2e-2)


@pytest.mark.parametrize(("parameters", "statistics"), [("bfloat16", "float32"), ("float64", "float64")])
def test_statistics_are_at_least_float32_and_counters_int32(parameters, statistics):
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, parameters), draw(0))
        optimizer = make_optimizer(CONFIG, STEPS, DECLARATIONS)
        state = jax.eval_shape(optimizer.init, parameters)
        updates, new_state = jax.eval_shape(optimizer.update, parameters, state, parameters)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(statistics)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(statistics), jnp.dtype("int32")}
    assert state == new_state, "a state of other types would compile the step twice"


def test_statistics_can_be_told_from_counters():
    """Sharding gives each statistic its parameter's sharding by `optax.tree.map_params`."""
    optimizer = make_optimizer(CONFIG, STEPS, DECLARATIONS)
    state = optimizer.init(draw(0))
    marked = optax.tree.map_params(
        optimizer, lambda _, name: name, state, DECLARATIONS, transform_non_params=lambda _: "counter"
    )
    marks = jax.tree.leaves(marked, is_leaf=lambda leaf: isinstance(leaf, Declaration | str))
    assert [mark for mark in marks if mark != "counter"] == 2 * jax.tree.leaves(DECLARATIONS)
    assert marks.count("counter") == 2
