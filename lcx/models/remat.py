"""What a layer keeps of its forward pass for its backward pass, and what that computes again.

Nothing is computed otherwise: outputs, states and gradients are those without a policy, to rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lcx.config import remat_chunk
from lcx.errors import UserError
from lcx.mixers import Context
from lcx.parallel.sharding import constrain
from lcx_kernels.residuals import KERNEL

_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_kernels = jax.checkpoint_policies.save_only_these_names(KERNEL)
_in_host = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(_products, _kernels),
    "offload": lambda *args, **params: _kernels(*args, **params) or _in_host(*args, **params),
    "full": jax.checkpoint_policies.nothing_saveable,
}
AXES = ("batch", "time", None)
# (parameters, x [batch, time, d_model], state or None, context) to (y like x, state, aux)
Run = Callable[[dict, jax.Array, dict | None, Context], tuple[jax.Array, dict, dict]]


def rematerialize(run: Run, policy: str, init_state: Callable[[int, int], dict]) -> Run:
    """The same function under a policy.

    Args:
      run: a layer.
      policy: a value of `ModelConfig.remat`: "none" keeps everything, "dots" what matrix products and kernels give,
        "offload" the same, the products in the host's memory, "full" nothing but the input; "time:TOKENS" takes the
        sequence by chunks, one after the other, and keeps the states between them, so that what is in between exists
        for one chunk at a time.
      init_state: (batch size, tokens) to an empty state of the layer, whose size does not grow with the tokens.
    """
    if policy == "none":
        return run
    tokens = remat_chunk(policy)
    again = jax.checkpoint(run, policy=POLICIES["full" if tokens else policy], prevent_cse=False)
    return _by_chunks(again, tokens, init_state) if tokens else again


def _by_chunks(run: Run, size: int, init_state: Callable[[int, int], dict]) -> Run:
    """`run` on chunks of `size` tokens, each from the state that the one before left; the last may be shorter.

    Metrics are those of the last chunk: of a state, they are the whole sequence's.
    """

    def over_time(params: dict, x: jax.Array, state: dict | None, context: Context) -> tuple[jax.Array, dict, dict]:
        batch, time = x.shape[:2]
        count, rest = divmod(time, size)
        if time <= size:
            return run(params, x, state, context)

        def part(arrays: tuple, state: dict, length: jax.Array) -> tuple[jax.Array, dict, dict]:
            x, positions, segment_ids = (constrain(array, AXES[: array.ndim]) for array in arrays)
            here = replace(context, positions=positions, segment_ids=segment_ids, length=length)
            y, state, aux = run(params, x, state, here)
            if aux.get("losses"):
                raise UserError(f'model.remat "time:{size}" is not for mixers with losses of their own; choose "full".')
            return y, state, aux

        def step(carry: tuple, arrays: tuple) -> tuple:
            state, length = carry
            y, state, aux = part(jax.tree.map(split_rows, arrays), state, length)
            return (state, length + jnp.int32(size)), (merge_rows(y), aux)

        # What is scanned has batch and time in one axis: XLA then takes the chunks of a lone row where they lie.
        merge_rows = lambda array: array.reshape(batch * size, *array.shape[2:])  # noqa: E731
        split_rows = lambda array: array.reshape(batch, size, *array.shape[1:])  # noqa: E731

        def cut(array: jax.Array) -> jax.Array:
            chunks = array[:, : count * size].reshape(batch, count, size, *array.shape[2:]).swapaxes(0, 1)
            return jax.vmap(merge_rows)(chunks)

        arrays = x, context.positions, context.segment_ids
        state = init_state(batch, time) if state is None else state
        (state, length), (y, aux) = jax.lax.scan(step, (state, context.length), jax.tree.map(cut, arrays))
        y = jax.vmap(split_rows)(y).swapaxes(0, 1).reshape(batch, count * size, -1)
        if not rest:
            return y, state, jax.tree.map(lambda value: value[-1], aux)
        last, state, aux = part(jax.tree.map(lambda array: array[:, count * size :], arrays), state, length)
        return jnp.concatenate([y, last], axis=1), state, aux

    return over_time


def check_time_remat(name: str, policy: str, mixer: Any) -> None:
    """Raises UserError where a mixer cannot be taken by chunks of time."""
    if remat_chunk(policy) is None:
        return
    key = f'model.remat.{name}="{policy}"'
    if "continuation" in mixer.lawful_except:
        raise UserError(f'{key}: this mixer declares that it cannot go on from a state; choose "full".')
    shapes = jax.eval_shape(lambda: mixer.init_state(1, 1))
    if mixer.capacity(shapes) is not None:
        raise UserError(f"{key}: this mixer's state grows with the sequence, as full attention's; choose \"full\".")
