"""What every backend of the selective scan is given."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Arguments(NamedTuple):
    """The arrays of a scan as the caller gave them, checked, in the caller's dtypes."""

    x: jax.Array  # [batch, time, channels]
    dt: jax.Array  # [batch, time, channels]
    A: jax.Array  # [channels, state]
    B: jax.Array  # [batch, time, state]
    C: jax.Array | None  # [batch, time, state]; None where only the final state is wanted
    D: jax.Array | None  # [channels]
    z: jax.Array | None  # [batch, time, channels]
    dt_bias: jax.Array | None  # [channels]
    initial_state: jax.Array  # [batch, channels, state], in the dtype of the arithmetic
    reset: jax.Array | None  # bool [batch, time]

    @property
    def dtype(self) -> jnp.dtype:
        """Of all arithmetic and of states: float32, or float64 if anything is."""
        return jnp.result_type(jnp.float32, *(array for array in self[:-1] if array is not None))


def step_sizes(dt: jax.Array, dt_bias: jax.Array | None, dt_softplus: bool) -> jax.Array:
    """What `dt` stands for: bias and softplus applied."""
    if dt_bias is not None:
        dt = dt + dt_bias
    return jax.nn.softplus(dt) if dt_softplus else dt


def around(scan: Callable) -> Callable:
    """A whole backend from a bare recurrence: steps before it, skip and gate after it, in operations of their own.

    Args: scan, from (x, dt, A, B, C, initial_state, reset, chunk_size) of one dtype to (y = h C or None, final state).
    Returns: the backend, from (Arguments, dt_softplus, chunk_size) to (y in x's dtype or None, final state).
    """

    def backend(arguments: Arguments, dt_softplus: bool, chunk_size: int | None) -> tuple:
        dtype = arguments.dtype
        x, dt, A, B, C, D, z, dt_bias, initial_state = (
            None if array is None else array.astype(dtype) for array in arguments[:-1]
        )
        dt = step_sizes(dt, dt_bias, dt_softplus)
        y, final_state = scan(x, dt, A, B, C, initial_state, arguments.reset, chunk_size)
        if D is not None:
            y = y + D * x
        if z is not None:
            y = y * jax.nn.silu(z)
        return None if y is None else y.astype(arguments.x.dtype), final_state

    return backend


def late(module: str) -> Callable:
    """The backend ``scan`` of a module of this package, imported when it first runs: it needs more than JAX's core."""

    def backend(arguments: Arguments, dt_softplus: bool, chunk_size: int | None) -> tuple:
        scan = importlib.import_module(f"lcx_kernels.selective_scan.{module}").scan
        return scan(arguments, dt_softplus, chunk_size)

    return backend
