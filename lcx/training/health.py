"""Is a step good? Decided inside the compiled step, from what the run itself has shown to be usual.

A step is bad whose loss or gradient norm is not finite, or lies far above the median of the last good steps. "Far" is
measured by their median absolute deviation, which one wild value among them does not move. A bad step is skipped: the
parameters, the optimizer's statistics and what rows carry stay as they were, only the counters go on.

Gradient norms that stay large while losses are what they were are no fault of the data, so that to go back would not
help: after as many steps as a rewind would wait for, the window begins again.

The statistics are a part of the train state, so that a resumed run judges as the one that was never stopped. So are the
data indices that the run steps over, once `lcx.training.quarantine` has found them to be of no use.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcx.config import HealthConfig
from lcx.errors import UserError

INTERVALS = 32  # of data indices, that a run can step over
LEAST_SPREAD = 0.01  # of the median: a window of equal values makes no spike of the next one
LEAST_MEDIAN = 0.1  # for that: where a loss has become 0, 1e-9 is no spike either
TO_SIGMA = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation

Tree = Any
Health = dict[str, jax.Array]


def initial(config: HealthConfig) -> Health:
    """What a run knows before its first step; {} where steps are not judged.

    losses, grad_norms: float32 [window], of the last good steps. accepted, streak: int32 [], good steps so far, and bad
    ones in a row. first_bad: int32 [], the data index of the streak's first step. losses_bad: bool [], whether a loss
    of the streak was not usual, or anything not finite. over: int32 [INTERVALS, 2], disjoint intervals [start, stop) of
    data indices that are stepped over, in order; unused ones are empty.
    """
    if not config.skip:
        return {}
    zero, window = jnp.zeros((), jnp.int32), jnp.zeros(config.window, jnp.float32)
    over = jnp.zeros((INTERVALS, 2), jnp.int32)
    return {
        "losses": window,
        "grad_norms": window,
        "accepted": zero,
        "streak": zero,
        "first_bad": zero,
        "losses_bad": jnp.zeros((), bool),
        "over": over,
    }


def judge(
    config: HealthConfig, health: Health, data_index: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Health, Health]:
    """(is the step bad? bool []; the health after it; why: the limits and the streak, by name)."""
    if not health:
        return jnp.zeros((), bool), {}, {}
    values = {"losses": loss.astype(jnp.float32), "grad_norms": grad_norm.astype(jnp.float32)}
    limits = {name: limit(health[name], health["accepted"], config.threshold) for name in values}
    finite = jnp.isfinite(values["losses"]) & jnp.isfinite(values["grad_norms"])
    within = {name: finite & (value <= limits[name]) for name, value in values.items()}
    good = within["losses"] & within["grad_norms"]
    streak = jnp.where(good, 0, health["streak"] + 1)
    losses_bad = ~good & (health["losses_bad"] | ~within["losses"])
    larger = (streak >= config.patience) & ~losses_bad  # gradients alone, which are usual from here on
    place = jnp.arange(config.window) == health["accepted"] % config.window
    windows = {name: jnp.where(place & good, value, health[name]) for name, value in values.items()}
    after = windows | {
        "accepted": jnp.where(larger, 0, health["accepted"] + good),
        "streak": jnp.where(larger, 0, streak),
        "first_bad": jnp.where(good | (health["streak"] > 0), health["first_bad"], data_index),
        "losses_bad": losses_bad,
        "over": health["over"],
    }
    why = {"loss_limit": limits["losses"], "grad_norm_limit": limits["grad_norms"]}
    return ~good, after, why | {name: after[name] for name in ("streak", "first_bad")}


def limit(values: jax.Array, accepted: jax.Array, threshold: float) -> jax.Array:
    """The largest value that is no spike, float32 []; infinite while less than half of the window is there.

    values: float32 [window], of which the last min(accepted, window) are there.
    """
    count = jnp.minimum(accepted, len(values))
    there = jnp.arange(len(values)) < count
    center = _median(values, there, count)
    spread = TO_SIGMA * _median(jnp.abs(values - center), there, count)
    highest = center + threshold * jnp.maximum(spread, LEAST_SPREAD * jnp.maximum(jnp.abs(center), LEAST_MEDIAN))
    return jnp.where(count >= len(values) // 2, highest, jnp.inf)


def _median(values: jax.Array, there: jax.Array, count: jax.Array) -> jax.Array:
    """Of the values that are there (the lower one of two in the middle); of none, any number."""
    return jnp.sort(jnp.where(there, values, jnp.inf))[jnp.maximum(count - 1, 0) // 2]


def choose(bad: jax.Array, before: Tree, after: Tree) -> Tree:
    """What a step leaves: `before` where it is bad."""
    return jax.tree.map(lambda old, new: jnp.where(bad, old, new), before, after)


def index_from(index: Any, health: Health) -> Any:
    """The first data index from this one on that is not stepped over; of NumPy or JAX, int32 []."""
    if not health:
        return index
    start, stop = health["over"][:, 0], health["over"][:, 1]
    inside = (start <= index) & (index < stop)  # of one interval at most, and none begins where another ends
    return index + (inside * (stop - index)).sum().astype(np.int32)


def restart_window(health: Health) -> Health:
    """The health of a new stage, whose losses may be of another size."""
    return health | {"accepted": jnp.zeros((), jnp.int32)} if health else {}


def step_over(health: Health, intervals: list[list[int]]) -> Health:
    """The health of a run that steps over these intervals [start, stop) too; arrays of NumPy, no streak.

    Raises UserError where there are too many.
    """
    known = [pair for pair in np.asarray(health["over"]).tolist() if pair[0] < pair[1]]
    merged: list[list[int]] = []
    for start, stop in sorted([*known, *intervals]):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    if len(merged) > INTERVALS:
        raise UserError(f"a run can step over {INTERVALS} stretches of its data, not {len(merged)}: look at the data.")
    over = np.zeros((INTERVALS, 2), np.int32)
    over[: len(merged)] = merged or np.zeros((0, 2))
    return health | {"over": over}
