"""Checks of arguments that the kernels share."""

import jax
import jax.numpy as jnp


def check(name: str, array: jax.Array | None, axes: str, *sizes: int | None, kind: type = jnp.floating) -> None:
    """Check an argument's shape and kind of dtype; an ``array`` of None (an optional argument left out) passes.

    Args:
      axes: what the axes are called, "[batch, time]".
      sizes: what they must measure, one each, None for any size.
      kind: a dtype or an abstract one (``jnp.floating``, ``jnp.integer``, ``bool``).

    Raises:
      ValueError: naming the argument, its shape or dtype, and what was expected.
    """
    if array is None:
        return
    fits = array.ndim == len(sizes) and all(
        size in (None, actual) for size, actual in zip(sizes, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: shape {array.shape}, expected {axes} = ({wanted})")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, expected {axes} of {kind.__name__} dtype")
