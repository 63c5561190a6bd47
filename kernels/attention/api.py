"""The public functions: they check arguments, pick the backend, fold in the sinks."""

import jax
import jax.numpy as jnp

from lcx_kernels.attention.arguments import Arguments, Static
from lcx_kernels.attention.choice import BACKENDS, choose

Pair = jax.Array | tuple[jax.Array, jax.Array]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Pair | None = None,
    sinks: jax.Array | None = None,
    positions: Pair | None = None,
    offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention with grouped heads, windows, documents and sinks, differentiable in both results.

    Query i sees key j if and only if every condition given holds, where index(.) is the place in the row:

        causal        index(j) <= index(i)
        window        index(i) - index(j) < window
        segment_ids   segment(i) == segment(j)

    Query head h reads key and value head h // (heads // kv_heads). Scores are scale * q.k, then, with a ``softcap``,
    softcap * tanh(scores / softcap). Softmax statistics and sums are at least float32 (float64 inputs stay float64).

    What a query does not see has no influence on it, to the bit, as long as it is finite; gradients likewise.
    A query that sees no key returns exactly 0 and a log-sum-exp of ``NO_KEY_LOG_SUM_EXP`` (-1e30, a finite floor), and
    gives and receives gradients of exactly 0, never NaN.

    Args:
      q: [batch, time, heads, K]; q, k and v have one floating dtype.
      k: [batch, keys, kv_heads, K]; kv_heads divides heads.
      v: [batch, keys, kv_heads, V].
      causal: whether a query sees no later keys.
      window: how many keys back from its own index a query sees, itself included; None for all. Static.
      segment_ids: int32 [batch, time] for both sides, or a (query, key) pair of [batch, time] and [batch, keys].
      sinks: [heads], a logit per head that joins the denominator of the softmax and nothing else (gpt-oss; a sink of 0
        is softmax-off-by-one): out is multiplied by sigmoid(log_sum_exp - sink).
      positions: indices in the row, int32, of the shapes of ``segment_ids``; may be negative, in any order. For
        alignments that are known only when running (decoding into a cache, a ring).
      offset: query t stands at slot offset + t of the keys, 0 <= offset <= keys - time. Static, so that a window costs
        time linear in T; excludes ``positions``. With neither, keys == time is required and offset is 0, unless no
        alignment is needed: without ``causal`` and ``window``.
      scale: what q.k is multiplied by, static; None for K ** -0.5.
      softcap: the bound of the capped scores, static and positive; None for no cap.
      backend: "auto", "reference" (dense), "xla" (blockwise), "pallas_tpu" (JAX's splash attention), "triton" or
        "cudnn". What each cannot do, says its ``refusal``.
      chunk_size: the number of queries of a block, at most; None for a tuned value. It does not change what is
        computed.

    Returns:
      out: [batch, time, heads, V] in q.dtype.
      log_sum_exp: [batch, time, heads], at least float32, the logarithm of the sum of exp(scores) over the keys seen,
        WITHOUT the sink, so that partial results over several sets of keys can be merged and the sink folded in once.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      BackendUnavailable: the backend named cannot run here, or cannot do this.
    """
    _check_sinks(q, sinks)
    arguments, static = _call(q, k, v, causal, window, segment_ids, positions, offset, scale, softcap, chunk_size)
    out, log_sum_exp = BACKENDS[choose(backend, arguments, static)].run(arguments, static)
    if sinks is not None:
        out = fold_sinks(out, log_sum_exp, sinks)
    return out.astype(q.dtype), log_sum_exp


def attention_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    delta: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Pair | None = None,
    positions: Pair | None = None,
    offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of an attention of whose keys those given are a part, or all, without its forward pass.

    The whole's log-sum-exp gives each weight of the whole softmax, so parts need nothing of each other: over parts
    that make up the whole, the dq are summed, the dk and dv put side by side. Dao et al. 2022, FlashAttention,
    algorithm 4; Liu et al. 2023, arXiv 2310.01889.

    Args:
      q, k, v and options: as of `attention`, of the part.
      log_sum_exp: of the whole, [batch, time, heads], at least float32, without the sink.
      d_out: the gradient of the whole's out, [batch, time, heads, V], floating. Where a sink was folded in, of the out
        before it.
      delta: sum(out * d_out, axis=-1) - d_log_sum_exp, with out and the gradient of the log-sum-exp of the whole;
        [batch, time, heads], at least float32.

    Returns: (dq, dk, dv) in the shapes and the dtype of q, k and v. A query whose log_sum_exp says that it sees no key
      gives and receives exactly 0.

    Raises: as `attention`.
    """
    arguments, static = _call(q, k, v, causal, window, segment_ids, positions, offset, scale, softcap, chunk_size)
    rows, wide = q.shape[:3], jnp.promote_types(q.dtype, jnp.float32)
    shapes = {"log_sum_exp": (log_sum_exp, rows), "d_out": (d_out, (*rows, v.shape[3])), "delta": (delta, rows)}
    for name, (array, shape) in shapes.items():
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating {list(shape)}, got {array.dtype}{list(array.shape)}")
    gradients = BACKENDS[choose(backend, arguments, static)].gradients
    return gradients(arguments, static, log_sum_exp.astype(wide), d_out, delta.astype(wide))


def _call(q, k, v, causal, window, segment_ids, positions, offset, scale, softcap, chunk_size):
    """The checked (`Arguments`, `Static`) of a call."""
    _check_arrays(q, k, v)
    for name, value in (("window", window), ("chunk_size", chunk_size), ("softcap", softcap)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive or None, got {value}")
    batch, time = q.shape[:2]
    keys = k.shape[1]
    indices = segments = (None, None)
    if positions is not None:
        if offset is not None:
            raise ValueError("give positions or offset, not both")
        indices = _pair("positions", positions, batch, time, keys)
    elif causal or window is not None or offset is not None:
        offset = _offset(offset, time, keys)
    else:
        offset = 0  # alignment hides nothing
    if segment_ids is not None:
        segments = _pair("segment_ids", segment_ids, batch, time, keys)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return Arguments(q, k, v, *indices, *segments), Static(causal, window, offset, scale, softcap, chunk_size)


def fold_sinks(out: jax.Array, log_sum_exp: jax.Array, sinks: jax.Array) -> jax.Array:
    """Let the sinks [heads] join the denominators of ``out``, a result of ``attention`` without them.

    Returns out * sigmoid(log_sum_exp - sinks), written so that the derivative is right also where the sigmoid is
    nearly 1, as over many keys: that of a sigmoid in floating point, s (1 - s), is then mostly rounding.
    """
    share = jnp.exp(-jax.nn.softplus(sinks.astype(log_sum_exp.dtype) - log_sum_exp))
    return out * share[..., None]


def _check_sinks(q: jax.Array, sinks: jax.Array | None) -> None:
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must be [heads] = {list(q.shape[2:3])}, got {list(sinks.shape)}")


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4 or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating with 4 axes, got {array.dtype}{list(array.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, _, heads, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "expected q [batch, time, heads, K], k [batch, keys, kv_heads, K] and v [batch, keys, kv_heads, V], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if heads % k.shape[2]:
        raise ValueError(f"the {k.shape[2]} key and value heads must divide the {heads} query heads")


def _pair(name: str, value: Pair, batch: int, time: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Return the query and the key side of an argument that may be one array for both, in int32."""
    pair = value if isinstance(value, tuple) else (value, value)
    for side, array, length in zip(("queries", "keys"), pair, (time, keys), strict=True):
        if array.shape != (batch, length) or not jnp.issubdtype(array.dtype, jnp.integer):
            shape = [batch, length]
            raise ValueError(f"{name} of the {side} must be integers {shape}, got {array.dtype}{list(array.shape)}")
    return pair[0].astype(jnp.int32), pair[1].astype(jnp.int32)


def _offset(offset: int | None, time: int, keys: int) -> int:
    if offset is None:
        if time != keys:
            raise ValueError(f"{time} queries and {keys} keys: say how they align with positions or offset")
        return 0
    if not 0 <= offset <= keys - time:
        raise ValueError(f"offset {offset} is outside 0 to keys - time = {keys - time}")
    return offset
