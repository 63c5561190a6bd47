"""The public functions: they check the arguments and pick the backend."""

from typing import Any

import jax
import jax.numpy as jnp

from lcx_kernels.checks import check
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.choice import choose
from lcx_kernels.chunked_memory.state import SegmentState, canonical

UPDATES = ("linear", "segment_delta", "delta_rule")
READS = ("inclusive", "exclusive")


def chunked_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    normalize: bool = False,
    update: str = "linear",
    read: str = "inclusive",
    chunk_size: int,
    positions: jax.Array | None = None,
    initial_state: Any = None,
    reset: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, Any]:
    """A memory with a matrix state: linear attention, SSD, gated linear attention, the delta rule, Infini-attention.

    Each of S heads has a memory M [K, V] and, if ``normalize``, a normaliser z [K]. A token resets them, lets them
    decay, writes, and reads:

        M, z = 0                                          where reset
        M, z = exp(log_decay) M, exp(log_decay) z         a factor a head, or a factor a key channel (row of M)
        M   += k v^T,  z += k                             linear
        M   += k (beta (v - k^T M))^T                     delta_rule (Yang et al. 2024, arXiv 2406.06484, equation 1)
        M   += k (v - k^T N / (k . y + 1e-6))^T,  z += k  segment_delta (arXiv 2404.07143, equation 5), where N, y are
                                                          M, z without what the token's own segment wrote
        out  = q^T M,  or  q^T M / (q . z + 1e-6)         if ``normalize``

    An "exclusive" read leaves out what the token's own segment wrote. A document's tokens are cut into segments by
    their positions: segment = position // chunk_size. Segments matter to exclusive reads and to segment_delta alone;
    otherwise any ``chunk_size`` gives the same, and it says how many tokens a backend may take at once.

    SSD (Mamba-2, arXiv 2405.21060) is linear, inclusive, one decay a head; gated linear attention (arXiv 2312.06635)
    one a key channel; Infini-attention is linear or segment_delta, exclusive and normalised.

    No scale or feature map is applied to q and k. All arithmetic is in float32, or in float64 if any argument is.
    Everything of a floating dtype has a gradient, through the initial and from the final state. A token's outputs and
    gradients do not depend, to the last bit, on tokens that a reset or causality cuts off from it.

    Args:
      q: queries, [batch, time, heads, K].
      k: keys, [batch, time, k heads, K].
      v: values, [batch, time, v heads, V]. S is the larger of the k and v heads. Of S and each number of heads one
        divides the other: head h of the larger goes with head h // ratio of the smaller.
      log_decay: [batch, time, S] or [batch, time, S, K]; not positive. None for no decay.
      beta: [batch, time, S], how much of a value is written; for delta_rule, and there required.
      normalize: whether reads are divided by those of the normaliser; not with delta_rule, required by segment_delta.
        Then q and k should not be negative.
      update: "linear", "segment_delta" (without decay) or "delta_rule".
      read: "inclusive" or "exclusive"; delta_rule has inclusive reads only.
      chunk_size: tokens of a segment.
      positions: int32 [batch, time], of the tokens in their documents; between resets they grow by one from token to
        token, and where reset, other than at the first token of a row, they are 0. None: tokens since the last reset,
        counted from 0 at the head of the row.
      initial_state: what the tokens before left behind, in a form that this function returns; None for nothing.
      reset: bool [batch, time]; True empties the memory before that token, the initial state too. None for nowhere.
      backend: "auto" (by platform and by what a backend can do), or the name of one: "reference", "xla", "pallas_tpu"
        or "triton".

    Returns:
      out [batch, time, the larger of heads and S, V] in v's dtype, and the final state in that of the arithmetic: M
      [batch, S, K, V], or (M, z [batch, S, K]) if ``normalize``. Where positions are given and segments matter it is a
      `SegmentState`, from which the row can go on in the midst of a segment; without positions the last segment is
      taken to be complete.

    Raises:
      ValueError: an argument has a wrong shape or dtype, a name is unknown, or arguments do not go together.
      BackendUnavailable: the named backend cannot run here, or cannot do this.
    """
    check("q", q, "[batch, time, heads, K]", None, None, None, None)
    static = check_static(update, read, normalize, chunk_size, log_decay, beta)
    arguments = gather(q, k, v, log_decay, beta, positions, reset, initial_state, static)
    out, state = choose(backend, arguments, static)(arguments, static)
    return out, as_returned(state, positions, static)


def check_static(update, read, normalize, chunk_size, log_decay, beta) -> Static:
    """Check what does not depend on shapes."""
    for name, value, choices in (("update", update, UPDATES), ("read", read, READS)):
        if value not in choices:
            raise ValueError(f"{name}: unknown name {value!r}, expected one of: {', '.join(choices)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}, expected at least 1")
    delta_rule, segment_delta = update == "delta_rule", update == "segment_delta"
    if delta_rule != (beta is not None):
        raise ValueError(
            f'beta: {"missing" if delta_rule else "given"}, expected with update="delta_rule" and no other'
        )
    if delta_rule and (normalize or read == "exclusive"):
        raise ValueError(f'update="delta_rule": {normalize=}, {read=}, expected normalize=False, read="inclusive"')
    if segment_delta and (not normalize or log_decay is not None):
        decay = "given" if log_decay is not None else None
        raise ValueError(
            f'update="segment_delta": {normalize=}, log_decay {decay}, expected normalize=True and no decay'
        )
    return Static(update, read, bool(normalize), chunk_size)


def gather(q, k, v, log_decay, beta, positions, reset, initial_state, static: Static) -> Arguments:
    """Check all arrays (q may be None) and put them into the form that backends take."""
    check("k", k, "[batch, time, k heads, K]", *(None,) * 4 if q is None else (*q.shape[:2], None, q.shape[3]))
    batch, time, _, width = k.shape
    if time == 0:
        raise ValueError(f"k: shape {k.shape}, expected at least one token of time")
    check("v", v, "[batch, time, v heads, V]", batch, time, None, None)
    heads = max(k.shape[2], v.shape[2])
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array is not None and max(array.shape[2], heads) % min(array.shape[2], heads):
            raise ValueError(
                f"{name}: {array.shape[2]} heads of shape {array.shape}, expected a divisor of {heads} memories"
                + (" or a multiple" if name == "q" else "")
            )
    if log_decay is not None:
        channels = log_decay.ndim == 4
        axes = "[batch, time, S, K]" if channels else "[batch, time, S]"
        check("log_decay", log_decay, axes, batch, time, heads, *[width] * channels)
    check("beta", beta, "[batch, time, S]", batch, time, heads)
    check("positions", positions, "[batch, time]", batch, time, kind=jnp.integer)
    check("reset", reset, "[batch, time]", batch, time, kind=bool)
    closes = None
    if static.segmented:
        places = since_reset(k, reset) if positions is None else positions
        closes = places % static.chunk_size == static.chunk_size - 1
    state = _initial_state(initial_state, k, v, static)
    found = Arguments(*jax.tree.map(jnp.asarray, (q, k, v, log_decay, beta, closes, reset)), state)
    return found._replace(state=jax.tree.map(lambda array: array.astype(found.dtype), state))


def since_reset(k: jax.Array, reset: jax.Array | None) -> jax.Array:
    """int32 [batch, time]: how many tokens of its document in this row are before each token."""
    index = jnp.zeros_like(k[:, :, 0, 0], jnp.int32) + jnp.arange(k.shape[1], dtype=jnp.int32)
    return index if reset is None else index - jax.lax.cummax(jnp.where(reset, index, 0), axis=1)


def as_returned(state: SegmentState, positions: jax.Array | None, static: Static) -> Any:
    """A backend's final state in the form that callers get."""
    if static.segmented and positions is not None:
        return state
    state = state.total()
    return (state.memory, state.normalizer) if static.normalize else state.memory


def _initial_state(given: Any, k: jax.Array, v: jax.Array, static: Static) -> SegmentState:
    """The state in the form that backends take, checked."""
    batch, heads, width, values = k.shape[0], max(k.shape[2], v.shape[2]), k.shape[3], v.shape[3]

    def nothing() -> tuple[jax.Array, jax.Array | None]:
        """Made from k and v, so that inside a shard_map it varies over the mesh axes over which these vary."""
        memory = jnp.zeros_like(k[:, 0, :1, :, None] * v[:, 0, :1, None, :])
        memory = jnp.broadcast_to(memory, (batch, heads, width, values))
        return memory, memory[..., 0] if static.normalize else None

    if given is None:
        empty = nothing()
        return SegmentState(*empty, *(empty if static.segmented else (None, None)))
    if isinstance(given, tuple) and not isinstance(given, SegmentState) and len(given) != 2:
        raise ValueError(f"initial_state: a tuple of {len(given)}, expected (memory, normalizer)")
    given = canonical(given)
    for name, wanted in (("memory", True), ("normalizer", static.normalize)):
        if (getattr(given, name) is not None) != wanted:
            raise ValueError(
                f"initial_state: {name} {'missing' if wanted else 'given'}, expected "
                f"{'(memory, normalizer)' if static.normalize else 'memory alone'} with normalize={static.normalize}"
            )
    for name, array in given._asdict().items():
        axes = "[batch, S, K, V]" if "memory" in name else "[batch, S, K]"
        check(f"initial_state.{name}", array, axes, batch, heads, width, *[values] * ("memory" in name))
    if not static.segmented:
        return given.total()
    missing = given.open_memory is None or (static.normalize and given.open_normalizer is None)
    opened = zip(given[2:], nothing() if missing else (None, None), strict=True)
    return SegmentState(*given[:2], *(empty if part is None else part for part, empty in opened))
