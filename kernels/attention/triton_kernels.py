"""Attention for NVIDIA GPUs: the Triton kernels. `triton_plan` launches them and says which blocks see each other.

Dao 2023, arXiv 2307.08691 (FlashAttention-2). A program of `forward` and `backward_queries` holds a block of queries of
one head and walks over blocks of keys; one of `backward_keys` holds a block of keys of one key and value head and walks
over the blocks of queries of all heads that read it. So every result is written by one program: no atomics.

A walk goes over the blocks [low, high) that the program's own may see, of which [low_full, high_full) see each other
whole: there, nothing is masked. Elsewhere pairs are selected, before and after every product that could make what is
not seen felt. Scores are in units of log 2, so that exponentials are powers of two.

Places in memory are int64 from the number of the row and the block on; within a block int32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NO_KEY_LOG_SUM_EXP = tl.constexpr(-1e30)


@triton.jit
def _tanh(x):
    """To the last digits also where it is small."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    square = x * x
    near = tl.abs(x) * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    size = tl.where(tl.abs(x) < 0.25, near, far)
    return tl.where(x < 0, -size, size)


@triton.jit
def _scores(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores from q.k, in units of log 2, and their derivative in q.k / SCALE."""
    if SOFTCAP is None:
        return products * (SCALE * LOG2E), 1.0
    else:
        capped = _tanh(products * (SCALE / SOFTCAP))
        return capped * (SOFTCAP * LOG2E), 1 - capped * capped


@triton.jit
def _places(array, start, STRIDE: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Pointers [BLOCK, PADDED] to tokens that lie STRIDE apart, from token ``start`` on."""
    first = array + tl.cast(start, tl.int64) * STRIDE
    return first + (tl.arange(0, BLOCK)[:, None] * STRIDE + tl.arange(0, PADDED)[None, :])


@triton.jit
def _load_block(
    array, start, length, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens start to start + BLOCK, [BLOCK, PADDED]; zeros from ``length`` on. WHOLE: there are that many."""
    places = _places(array, start, STRIDE, BLOCK, PADDED)
    exists = (tl.arange(0, PADDED) < WIDTH)[None, :]
    here = (start + tl.arange(0, BLOCK) < length)[:, None]
    if WHOLE:
        if WIDTH == PADDED:
            return tl.load(places)
        else:
            return tl.load(places, mask=exists, other=0.0)
    else:
        if WIDTH == PADDED:
            return tl.load(places, mask=here, other=0.0)
        else:
            return tl.load(places, mask=here & exists, other=0.0)


@triton.jit
def _store_block(
    array, block, start, length, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    exists = (tl.arange(0, PADDED) < WIDTH)[None, :]
    here = (start + tl.arange(0, BLOCK) < length)[:, None]
    places = _places(array, start, STRIDE, BLOCK, PADDED)
    tl.store(places, block.to(array.dtype.element_ty), mask=here & exists)


@triton.jit
def _side(index, segment, start, length, offset, HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """(indices, segments, which exist) of a block of queries or keys; without HAS_SEGMENT there are no segments."""
    place = start + tl.arange(0, BLOCK)
    exists = place < length
    numbers = place + offset
    if HAS_INDEX:
        numbers = tl.load(index + place, mask=exists, other=0)
    segments = numbers
    if HAS_SEGMENT:
        segments = tl.load(segment + place, mask=exists, other=0)
    return numbers, segments, exists


@triton.jit
def _sees(queries, query_segments, keys, key_segments, exist, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
          HAS_SEGMENT: tl.constexpr):  # fmt: skip
    """Who sees whom; the sides broadcast against each other."""
    mask = exist
    if CAUSAL:
        mask = mask & (keys <= queries)
    if WINDOW is not None:
        mask = mask & (keys > queries - WINDOW)
    if HAS_SEGMENT:
        mask = mask & (query_segments == key_segments)
    return mask


@triton.jit
def _range(ranges, row, block, blocks, PER_ROW: tl.constexpr):
    """(low, low_full, high_full, high) of a block; ranges [rows or 1, blocks, 4]."""
    at = ranges + block * 4
    if PER_ROW:
        at += row * blocks * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _forward_step(
    q, k_head, v_head, key_index, key_segment, queries, query_segments, start, keys,
    out, total, maximum,
    MASKED: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, PADDED: tl.constexpr, PADDED_VALUE: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys joins the running sums out [queries, V], total and maximum [queries]."""
    k = _load_block(k_head, start, keys, WIDTH, STRIDE_K, KEYS, PADDED, not MASKED)
    scores, _ = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), SCALE, SOFTCAP)
    if MASKED:
        numbers, segments, exist = _side(key_index, key_segment, start, keys, 0, HAS_INDEX, HAS_SEGMENT, KEYS)
        sees = _sees(
            queries[:, None], query_segments[:, None], numbers[None, :], segments[None, :], exist[None, :],
            CAUSAL, WINDOW, HAS_SEGMENT,
        )  # fmt: skip
        scores = tl.where(sees, scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(maximum - shift)
    total = total * rescale + tl.sum(weights, axis=1)
    v = _load_block(v_head, start, keys, VALUE_WIDTH, STRIDE_V, KEYS, PADDED_VALUE, not MASKED)
    out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
    return out, total, larger


@triton.jit
def forward(
    q, k, v, query_index, key_index, query_segment, key_segment, ranges,
    time, keys, offset,
    out, log_sum_exp,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PADDED: tl.constexpr, PADDED_VALUE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PER_ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [batch, time, HEADS, VALUE_WIDTH] and log_sum_exp [batch, time, HEADS], of blocks of QUERIES queries.

    q [batch, time, HEADS, WIDTH], k and v [batch, keys, KV_HEADS, ...]; indices and segments [batch, time or keys];
    ranges [batch if PER_ROW else 1, blocks, 4], of blocks of KEYS keys. Without HAS_INDEX, query t has the index
    offset + t. What is absent is not touched.
    """
    blocks = tl.cdiv(time, QUERIES)
    block = blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the last ones take longest
    head, row = (tl.program_id(0) // blocks) % HEADS, (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    start = block * QUERIES
    q_head = q + row * time * (HEADS * WIDTH) + head * WIDTH
    k_head = k + row * keys * (KV_HEADS * WIDTH) + kv_head * WIDTH
    v_head = v + row * keys * (KV_HEADS * VALUE_WIDTH) + kv_head * VALUE_WIDTH
    key_index, key_segment = key_index + row * keys, key_segment + row * keys

    q_block = _load_block(q_head, start, time, WIDTH, HEADS * WIDTH, QUERIES, PADDED, False)
    queries, query_segments, exist = _side(
        query_index + row * time, query_segment + row * time, start, time, offset, HAS_INDEX, HAS_SEGMENT, QUERIES
    )
    sums = tl.zeros([QUERIES, PADDED_VALUE], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    low, low_full, high_full, high = _range(ranges, row, block, blocks, PER_ROW)
    for at in range(low_full, high_full):
        sums, total, maximum = _forward_step(
            q_block, k_head, v_head, key_index, key_segment, queries, query_segments, at * KEYS, keys,
            sums, total, maximum,
            False, KV_HEADS * WIDTH, KV_HEADS * VALUE_WIDTH, WIDTH, VALUE_WIDTH, PADDED, PADDED_VALUE, KEYS,
            CAUSAL, WINDOW, HAS_INDEX, HAS_SEGMENT, SCALE, SOFTCAP, PRECISION,
        )  # fmt: skip
    for i in tl.range(low, high - (high_full - low_full), num_stages=1):
        at = tl.where(i < low_full, i, i + (high_full - low_full))
        sums, total, maximum = _forward_step(
            q_block, k_head, v_head, key_index, key_segment, queries, query_segments, at * KEYS, keys,
            sums, total, maximum,
            True, KV_HEADS * WIDTH, KV_HEADS * VALUE_WIDTH, WIDTH, VALUE_WIDTH, PADDED, PADDED_VALUE, KEYS,
            CAUSAL, WINDOW, HAS_INDEX, HAS_SEGMENT, SCALE, SOFTCAP, PRECISION,
        )  # fmt: skip
    blind = total == 0
    divisor = tl.where(blind, 1.0, total)
    found = tl.where(blind, NO_KEY_LOG_SUM_EXP, (maximum + tl.log2(divisor)) / LOG2E)
    out_head = out + row * time * (HEADS * VALUE_WIDTH) + head * VALUE_WIDTH
    _store_block(
        out_head, sums / divisor[:, None], start, time, VALUE_WIDTH, HEADS * VALUE_WIDTH, QUERIES, PADDED_VALUE
    )
    place = (row * time + start + tl.arange(0, QUERIES)) * HEADS + head
    tl.store(log_sum_exp + place, found, mask=exist)


@triton.jit
def _queries_step(
    q, d_out, log_sum_exp, shift, k_head, v_head, key_index, key_segment, queries, query_segments, start, keys, dq,
    MASKED: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, PADDED: tl.constexpr, PADDED_VALUE: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys adds to dq / SCALE [queries, K]. log_sum_exp is in units of log 2."""
    k = _load_block(k_head, start, keys, WIDTH, STRIDE_K, KEYS, PADDED, not MASKED)
    v = _load_block(v_head, start, keys, VALUE_WIDTH, STRIDE_V, KEYS, PADDED_VALUE, not MASKED)
    scores, slope = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), SCALE, SOFTCAP)
    weights = tl.exp2(scores - log_sum_exp[:, None])
    d_scores = weights * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - shift[:, None])
    if MASKED:
        numbers, segments, exist = _side(key_index, key_segment, start, keys, 0, HAS_INDEX, HAS_SEGMENT, KEYS)
        sees = _sees(
            queries[:, None], query_segments[:, None], numbers[None, :], segments[None, :], exist[None, :],
            CAUSAL, WINDOW, HAS_SEGMENT,
        )  # fmt: skip
        d_scores = tl.where(sees, d_scores, 0.0)
    if SOFTCAP is not None:
        d_scores = d_scores * slope
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def backward_queries(
    q, k, v, query_index, key_index, query_segment, key_segment, ranges, d_out, log_sum_exp, shift,
    time, keys, offset,
    dq,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PADDED: tl.constexpr, PADDED_VALUE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PER_ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [batch, time, HEADS, WIDTH]. The derivative of the loss in a score is p (v.d_out - shift).

    d_out as out; log_sum_exp and shift float32 [batch, time, HEADS]; all else as in `forward`.
    """
    blocks = tl.cdiv(time, QUERIES)
    block = blocks - 1 - tl.program_id(0) % blocks
    head, row = (tl.program_id(0) // blocks) % HEADS, (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    start = block * QUERIES
    k_head = k + row * keys * (KV_HEADS * WIDTH) + kv_head * WIDTH
    v_head = v + row * keys * (KV_HEADS * VALUE_WIDTH) + kv_head * VALUE_WIDTH
    key_index, key_segment = key_index + row * keys, key_segment + row * keys

    before, before_out = row * time * (HEADS * WIDTH) + head * WIDTH, row * time * (HEADS * VALUE_WIDTH)
    q_block = _load_block(q + before, start, time, WIDTH, HEADS * WIDTH, QUERIES, PADDED, False)
    d_out_block = _load_block(
        d_out + before_out + head * VALUE_WIDTH, start, time, VALUE_WIDTH, HEADS * VALUE_WIDTH, QUERIES, PADDED_VALUE,
        False,
    )  # fmt: skip
    queries, query_segments, exist = _side(
        query_index + row * time, query_segment + row * time, start, time, offset, HAS_INDEX, HAS_SEGMENT, QUERIES
    )
    place = (row * time + start + tl.arange(0, QUERIES)) * HEADS + head
    total = tl.load(log_sum_exp + place, mask=exist, other=float("inf")) * LOG2E
    shifts = tl.load(shift + place, mask=exist, other=0.0)
    sums = tl.zeros([QUERIES, PADDED], tl.float32)
    low, low_full, high_full, high = _range(ranges, row, block, blocks, PER_ROW)
    for at in range(low_full, high_full):
        sums = _queries_step(
            q_block, d_out_block, total, shifts, k_head, v_head, key_index, key_segment, queries, query_segments,
            at * KEYS, keys, sums,
            False, KV_HEADS * WIDTH, KV_HEADS * VALUE_WIDTH, WIDTH, VALUE_WIDTH, PADDED, PADDED_VALUE, KEYS,
            CAUSAL, WINDOW, HAS_INDEX, HAS_SEGMENT, SCALE, SOFTCAP, PRECISION,
        )  # fmt: skip
    for i in tl.range(low, high - (high_full - low_full), num_stages=1):
        at = tl.where(i < low_full, i, i + (high_full - low_full))
        sums = _queries_step(
            q_block, d_out_block, total, shifts, k_head, v_head, key_index, key_segment, queries, query_segments,
            at * KEYS, keys, sums,
            True, KV_HEADS * WIDTH, KV_HEADS * VALUE_WIDTH, WIDTH, VALUE_WIDTH, PADDED, PADDED_VALUE, KEYS,
            CAUSAL, WINDOW, HAS_INDEX, HAS_SEGMENT, SCALE, SOFTCAP, PRECISION,
        )  # fmt: skip
    _store_block(dq + before, sums * SCALE, start, time, WIDTH, HEADS * WIDTH, QUERIES, PADDED)


@triton.jit
def _keys_step(
    k, v, q_head, d_out_head, log_sum_exp, shift, query_index, query_segment, numbers, segments, exist,
    start, time, offset, dk, dv,
    MASKED: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PADDED: tl.constexpr,
    PADDED_VALUE: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head adds to dk / SCALE [keys, K] and dv [keys, V]. Scores lie keys first."""
    q = _load_block(q_head, start, time, WIDTH, HEADS * WIDTH, QUERIES, PADDED, not MASKED)
    d_out = _load_block(d_out_head, start, time, VALUE_WIDTH, HEADS * VALUE_WIDTH, QUERIES, PADDED_VALUE, not MASKED)
    here = start + tl.arange(0, QUERIES) < time
    first, place = tl.cast(start, tl.int64) * HEADS, tl.arange(0, QUERIES) * HEADS
    total = tl.load(log_sum_exp + first + place, mask=here, other=0.0) * LOG2E
    shifts = tl.load(shift + first + place, mask=here, other=0.0)
    scores, slope = _scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), SCALE, SOFTCAP)
    weights = tl.exp2(scores - total[None, :])
    if MASKED:
        queries, query_segments, here = _side(
            query_index, query_segment, start, time, offset, HAS_INDEX, HAS_SEGMENT, QUERIES
        )
        sees = _sees(
            queries[None, :], query_segments[None, :], numbers[:, None], segments[:, None],
            exist[:, None] & here[None, :], CAUSAL, WINDOW, HAS_SEGMENT,
        )  # fmt: skip
        weights = tl.where(sees, weights, 0.0)
    dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    d_scores = weights * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - shifts[None, :])
    if MASKED:
        d_scores = tl.where(sees, d_scores, 0.0)
    if SOFTCAP is not None:
        d_scores = d_scores * slope
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_keys(
    q, k, v, query_index, key_index, query_segment, key_segment, ranges, d_out, log_sum_exp, shift,
    time, keys, offset,
    dk, dv,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    PADDED: tl.constexpr, PADDED_VALUE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SEGMENT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PER_ROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [batch, keys, KV_HEADS, ...], of blocks of KEYS keys.

    ranges [batch if PER_ROW else 1, blocks of keys, 4], of blocks of queries; all else as in `backward_queries`.
    """
    blocks = tl.cdiv(keys, KEYS)
    block = tl.program_id(0) % blocks
    kv_head, row = (tl.program_id(0) // blocks) % KV_HEADS, (tl.program_id(0) // blocks // KV_HEADS).to(tl.int64)
    start = block * KEYS
    before = row * keys * (KV_HEADS * WIDTH) + kv_head * WIDTH
    before_v = row * keys * (KV_HEADS * VALUE_WIDTH) + kv_head * VALUE_WIDTH
    k_block = _load_block(k + before, start, keys, WIDTH, KV_HEADS * WIDTH, KEYS, PADDED, False)
    v_block = _load_block(v + before_v, start, keys, VALUE_WIDTH, KV_HEADS * VALUE_WIDTH, KEYS, PADDED_VALUE, False)
    numbers, segments, exist = _side(
        key_index + row * keys, key_segment + row * keys, start, keys, 0, HAS_INDEX, HAS_SEGMENT, KEYS
    )
    query_index, query_segment = query_index + row * time, query_segment + row * time
    sum_k = tl.zeros([KEYS, PADDED], tl.float32)
    sum_v = tl.zeros([KEYS, PADDED_VALUE], tl.float32)
    low, low_full, high_full, high = _range(ranges, row, block, blocks, PER_ROW)
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        q_head = q + row * time * (HEADS * WIDTH) + head * WIDTH
        d_out_head = d_out + row * time * (HEADS * VALUE_WIDTH) + head * VALUE_WIDTH
        totals, shifts = log_sum_exp + row * time * HEADS + head, shift + row * time * HEADS + head
        for at in range(low_full, high_full):
            sum_k, sum_v = _keys_step(
                k_block, v_block, q_head, d_out_head, totals, shifts, query_index, query_segment, numbers, segments,
                exist, at * QUERIES, time, offset, sum_k, sum_v,
                False, HEADS, WIDTH, VALUE_WIDTH, PADDED, PADDED_VALUE, QUERIES, CAUSAL, WINDOW, HAS_INDEX,
                HAS_SEGMENT, SCALE, SOFTCAP, PRECISION,
            )  # fmt: skip
        for i in tl.range(low, high - (high_full - low_full), num_stages=1):
            at = tl.where(i < low_full, i, i + (high_full - low_full))
            sum_k, sum_v = _keys_step(
                k_block, v_block, q_head, d_out_head, totals, shifts, query_index, query_segment, numbers, segments,
                exist, at * QUERIES, time, offset, sum_k, sum_v,
                True, HEADS, WIDTH, VALUE_WIDTH, PADDED, PADDED_VALUE, QUERIES, CAUSAL, WINDOW, HAS_INDEX,
                HAS_SEGMENT, SCALE, SOFTCAP, PRECISION,
            )  # fmt: skip
    _store_block(dk + before, sum_k * SCALE, start, keys, WIDTH, KV_HEADS * WIDTH, KEYS, PADDED)
    _store_block(dv + before_v, sum_v, start, keys, VALUE_WIDTH, KV_HEADS * VALUE_WIDTH, KEYS, PADDED_VALUE)
