"""Learning-rate schedules: shapes between 0 and 1 that multiply every parameter's peak learning rate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lcx.config import OptimizerConfig

Shape = Callable[[jax.typing.ArrayLike], jax.Array]


def schedule_shape(config: OptimizerConfig, steps: int) -> Shape:
    """The learning rate of each step over its peak, for a run of `steps` steps.

    Args:
      config: the optimizer's section (schedule, warmup_steps, final_ratio, decay_fraction).
      steps: length of the run, at least 1; the warm-up, then the decay, are clamped to it.

    Returns:
      A function of the number of updates made so far (int32, 0 at the first step) to a float32 scalar in [0, 1].
      The first step of a warm-up of n steps has 1/n (with 0 it would be lost), the n-th has 1, and the run's last
      step has final_ratio, unless no step is left to decay in. Beyond the run the last value holds.
    """
    warmup = min(config.warmup_steps, steps)
    after_warmup = SCHEDULES[config.schedule](config, steps, steps - warmup)
    ramp = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    joined = optax.join_schedules([ramp, after_warmup], [warmup])

    def shape(step: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.minimum(jnp.asarray(step, jnp.int32) + 1, steps)  # steps from 1
        # optax's first piece ends before its boundary: the last step of the warm-up is the next piece's 0, which is 1
        return jnp.asarray(joined(count), jnp.float32)

    return shape


def _cosine(config: OptimizerConfig, steps: int, remaining: int) -> Shape:
    """Half a cosine from 1 to final_ratio (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts)."""
    return optax.cosine_decay_schedule(1.0, max(remaining, 1), alpha=config.final_ratio)


def _warmup_stable_decay(config: OptimizerConfig, steps: int, remaining: int) -> Shape:
    """Constant, then a decay over the last decay_fraction of all steps.

    The schedule is MiniCPM's (Hu et al. 2024, arXiv 2404.06395); the decay is 1 - sqrt(progress), which Haegele et al.
    (2024, arXiv 2405.18392, section 3) found better than a linear one; here it ends at final_ratio.
    """
    decay = min(round(config.decay_fraction * steps), remaining)
    stable = remaining - decay

    def shape(count: jax.Array) -> jax.Array:
        progress = jnp.clip((count - stable) / max(decay, 1), 0.0, 1.0)
        return 1.0 - (1.0 - config.final_ratio) * jnp.sqrt(progress)

    return shape


def _constant(config: OptimizerConfig, steps: int, remaining: int) -> Shape:
    return optax.constant_schedule(1.0)


SCHEDULES = {"cosine": _cosine, "wsd": _warmup_stable_decay, "constant": _constant}
