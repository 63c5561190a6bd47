"""The public functions: they check the arguments and pick the backend."""

import jax
import jax.numpy as jnp

from lcx_kernels.backends import resolve_backend
from lcx_kernels.checks import check
from lcx_kernels.chunked_memory import reference, xla
from lcx_kernels.chunked_memory.state import SegmentState

_SEGMENTED = {"reference": reference.segment_memory, "xla": xla.segment_memory}
_AUTO = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}
_UPDATES = ("linear", "segment_delta")

__all__ = ["SegmentState", "segment_memory", "select_backend"]


def select_backend(backend: str) -> str:
    """The name of the implementation that `backend` means here; see `resolve_backend` for what it raises."""
    return resolve_backend(backend, _SEGMENTED, _AUTO)


def segment_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    segment_length: int,
    update: str = "linear",
    initial_state: SegmentState | None = None,
    reset: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, SegmentState]:
    """The compressive memory of Infini-attention (arXiv 2404.07143, equations 3 to 5).

    A document's tokens are cut into segments by their positions, segment = position // segment_length. A token reads
    what the segments before its own wrote; a segment writes when it is complete:

        out[t] = M^T q[t] / (z . q[t] + 1e-6)                           0 in a document's first segment
        M     += sum over the segment of k[t] v[t]^T                    linear
        M     += sum of k[t] (v[t] - M^T k[t] / (z . k[t] + 1e-6))^T    segment_delta, M and z as before the segment
        z     += sum over the segment of k[t]

    All arithmetic is in float32, or in float64 if any argument is. No scale or feature map is applied to q and k, which
    should not be negative. A token's outputs and gradients do not depend, to the last bit, on other documents.

    Args:
      q: [batch, time, heads, K]; query head h reads the memory h // (heads // kv_heads).
      k: [batch, time, kv_heads, K].
      v: [batch, time, kv_heads, V].
      positions: int32 [batch, time], of the tokens in their documents; they grow by one from token to token.
      segment_length: tokens of a segment.
      update: "linear" or "segment_delta".
      initial_state: what the tokens before left behind; None for nothing.
      reset: bool [batch, time]; True where a token has no token of its document before it. Other than at the first
        token of the row this must be where positions is 0. None for nowhere.
      backend: "auto" (by platform), "reference" or "xla".

    Returns:
      out [batch, time, heads, V] and the final state, both in the dtype of the arithmetic.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or a name is unknown.
      BackendUnavailable: the named backend cannot run here.
    """
    implementation = _SEGMENTED[select_backend(backend)]
    if update not in _UPDATES:
        raise ValueError(f"update: unknown name {update!r}, expected one of: {', '.join(_UPDATES)}")
    if segment_length < 1:
        raise ValueError(f"segment_length: {segment_length}, expected at least 1")
    check("q", q, "[batch, time, heads, K]", None, None, None, None)
    batch, time, heads, width = q.shape
    check("k", k, "[batch, time, kv_heads, K]", batch, time, None, width)
    kv_heads = k.shape[2]
    check("v", v, "[batch, time, kv_heads, V]", batch, time, kv_heads, None)
    check("positions", positions, "[batch, time]", batch, time, kind=jnp.integer)
    check("reset", reset, "[batch, time]", batch, time, kind=bool)
    if heads % kv_heads:
        raise ValueError(f"k: {kv_heads} key and value heads, expected a divisor of the {heads} query heads")
    if initial_state is None:
        # Made from k and v, so that inside a shard_map the state varies over the mesh axes over which these vary.
        outer = jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :])
        initial_state = SegmentState(outer, outer[..., 0], outer, outer[..., 0])
    sizes = (batch, kv_heads, width, v.shape[3])
    for name, array in initial_state._asdict().items():
        matrix = "memory" in name
        axes = "[batch, kv_heads, K, V]" if matrix else "[batch, kv_heads, K]"
        check(f"initial_state.{name}", array, axes, *sizes[: 3 + matrix])

    dtype = jnp.result_type(jnp.float32, q, k, v, *initial_state)
    q, k, v, initial_state = jax.tree.map(lambda array: array.astype(dtype), (q, k, v, initial_state))
    if reset is None:
        reset = jnp.zeros_like(positions, dtype=bool)
    opens = (positions % segment_length == 0) & ~reset
    q = q.reshape(batch, time, kv_heads, heads // kv_heads, width)
    out, state = implementation(q, k, v, opens, reset, update == "segment_delta", segment_length, initial_state)
    return out.reshape(batch, time, heads, -1), state
