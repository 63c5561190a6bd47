"""What a kernel's backward pass needs of its forward pass, by a name that remat policies know."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

KERNEL = "kernel"
"""The name of all results of kernels: `jax.checkpoint_policies.save_only_these_names(KERNEL)` keeps them."""


def keep(tree: Any) -> Any:
    """The same arrays with the name KERNEL."""
    return jax.tree.map(lambda array: checkpoint_name(array, KERNEL), tree)


def named(forward: Callable) -> Callable:
    """A forward rule of `jax.custom_vjp` whose results have the name KERNEL.

    forward: (arguments) -> (outputs, residuals). Arguments among the residuals keep the names that they have: whoever
    made them says whether they are kept.
    """

    @functools.wraps(forward)
    def rule(*arguments: Any) -> tuple[Any, Any]:
        given = {id(getattr(leaf, "value", leaf)) for leaf in jax.tree.leaves(arguments)}  # .value: of symbolic zeros
        known: dict[int, jax.Array] = {}

        def mark(leaf: Any) -> Any:
            if id(leaf) in given or not isinstance(leaf, jax.Array):
                return leaf
            return known.setdefault(id(leaf), checkpoint_name(leaf, KERNEL))

        return jax.tree.map(mark, forward(*arguments))

    return rule
