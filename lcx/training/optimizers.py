"""Optimizers over optax, whose groups come from what each parameter declares of itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcx.config import OptimizerConfig, choose
from lcx.params import Declaration
from lcx.training.schedules import schedule_shape

Tree = Any  # a pytree


def make_optimizer(config: OptimizerConfig, steps: int, declarations: Tree) -> optax.GradientTransformation:
    """The gradient transformation of a run: clipping, the optimizer's direction, the learning rates, in that order.

    Args:
      config: the optimizer's section of the config.
      steps: length of the run, from which the schedule follows.
      declarations: the structure of the parameters, with a `Declaration` for each.

    Returns:
      An optax transformation of the gradients, averaged over the batch, to updates (to be added). It computes and keeps
      its statistics in float32, or wider where the parameters are; its counters are int32.

    Raises UserError for an optimizer that is not in the table.
    """
    decays = jax.tree.map(lambda declaration: config.decay_all or declaration.decay, declarations)
    return _widened(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            choose("optimizer", config.name, OPTIMIZERS)(config, decays),
            optax.scale_by_schedule(schedule_shape(config, steps)),
            _scale_by_peaks(config, declarations),
        )
    )


def _adamw(config: OptimizerConfig, decays: Tree) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
    beta1, beta2 = config.betas
    return optax.chain(
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def _lion(config: OptimizerConfig, decays: Tree) -> optax.GradientTransformation:
    """The sign of an average of gradient and momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Its authors advise a learning rate of a third to a tenth of AdamW's, with a weight decay as much larger.
    """
    beta1, beta2 = config.betas
    return optax.chain(
        optax.scale_by_lion(b1=beta1, b2=beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


# (config, tree of flags: does it decay?) -> a transformation of gradients to directions that learning rates multiply
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Tree], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
}


def _scale_by_peaks(config: OptimizerConfig, declarations: Tree) -> optax.GradientTransformation:
    """Multiplies each parameter's direction by minus its peak learning rate."""

    def peak(declaration: Declaration) -> float:
        return declaration.learning_rate * (1.0 if declaration.absolute else config.learning_rate)

    peaks = jax.tree.map(peak, declarations)
    return optax.stateless(lambda directions, _: jax.tree.map(lambda peak, d: -peak * d, peaks, directions))


def _widened(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` seeing parameters and gradients in at least float32, so that its statistics are never bfloat16."""

    def widen(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(gradients: Tree, state: Tree, parameters: Tree) -> tuple[Tree, Tree]:
        return inner.update(widen(gradients), state, widen(parameters))

    return optax.GradientTransformation(lambda parameters: inner.init(widen(parameters)), update)
