"""The chunked memory for NVIDIA GPUs: the Triton kernels. `triton_plan` launches them; see there for how they combine.

Tokens are taken in chunks of C, aligned to the row. A token r of a chunk decays by exp(a[r]); with sums over its
tokens in the order of time, and S the memory before the chunk (arXiv 2405.21060, section 6):

    L[t, s] = exp(a[s+1] + .. + a[t]) for s <= t, else 0      c[t] = exp(a[first] + .. + a[t])
    e[s]    = exp(a[s+1] + .. + a[last])                      f = exp(a[first] + .. + a[last])
    out = (q k^T * L) v + c * (q S)                           S after the chunk = f S + k^T (e * v)

Each exponent is a sum of its own tokens: their differences come from sums kept in two numbers, the second what the
first has lost, so that a small decay after a large one keeps all its digits.

Documents: a kernel goes through those of a chunk one by one and loads only the tokens of that one, 0 elsewhere, and
stores only these. So not even a NaN reaches another document, and to the bit it matters not what others hold. Only the
first document of a chunk sees the state before it, only the last one the state after it.

Operands of products are bfloat16 or float32, sums are float32 always. Offsets are int64 from the token's number on.
What several programs share each writes for itself, to be summed outside in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from lcx_kernels.chunked_memory.triton_channel_kernels import (  # noqa: F401 - launched as this module's
    channel_carry,
    channel_key_gradients,
    channel_outputs,
    channel_value_gradients,
)
from lcx_kernels.chunked_memory.triton_tiles import LOWEST, bad_rows, documents, is_finite, load_tile, nan_from

EPSILON = tl.constexpr(1e-6)


@triton.jit
def _add_exactly(high_a, low_a, high_b, low_b):
    """The sum of two numbers that each are kept in two."""
    high = high_a + high_b
    part = high - high_a
    lost = (high_a - (high - part)) + (high_b - part)
    return high, low_a + low_b + lost


@triton.jit
def _sums(decay):
    """Sums of [C] from the first to each token, and of all, each in two numbers."""
    high, low = tl.associative_scan((decay, tl.zeros_like(decay)), 0, _add_exactly)
    last = tl.arange(0, decay.shape[0]) == decay.shape[0] - 1
    return high, low, tl.sum(tl.where(last, high, 0.0)), tl.sum(tl.where(last, low, 0.0))


@triton.jit
def _weighed(product, high, low, C: tl.constexpr, STRICT: tl.constexpr):
    """product * L, where L[t, s] is the decay from token s to token t; 0 where s is later, STRICT: or the same."""
    causal = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :] + STRICT
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.where(causal, product * tl.exp(tl.where(causal, exponent, 0.0)), 0.0)


@triton.jit
def _load_decay(log_decay, offsets, mask, HAS_DECAY: tl.constexpr):
    if HAS_DECAY:
        decay = tl.load(log_decay + offsets, mask=mask, other=0.0).to(tl.float32)
        return tl.where(decay < LOWEST, LOWEST, decay)  # and NaN stays
    else:
        return tl.zeros_like(offsets).to(tl.float32)


@triton.jit
def carry(
    x, y, log_decay, reset, weight, slope, start, slope_start,
    time, length, spans,
    borders, slope_borders, ends, slope_ends, elapsed, kept,
    BACK: tl.constexpr, KEEP: tl.constexpr, SUMMARY: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_SLOPE: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, READERS: tl.constexpr,
    X_HEADS: tl.constexpr, Y_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state chunk by chunk through a span of the row's time: S becomes f S + x^T (e * y).

    BACK: its gradient from the end, G becomes f G + x^T (c * y) with x the queries and y the gradient of out, of all
    READERS of a state. x [batch, time, X_HEADS, K], y [batch, time, Y_HEADS, V], log_decay [batch, time, HEADS], reset
    [batch, time]; start [batch, spans, HEADS, K, V].
    Writes ends [batch, spans, HEADS, K, V]; KEEP: borders [batch, chunks, HEADS, K, V], the state before each chunk,
    with BACK the gradient of that after it. SUMMARY: starts from zero, writes the sum of the decays, elapsed, and 0 or
    1 whether anything lasts, kept [batch, spans, HEADS].
    HAS_SLOPE: the same of normalisers, slope_* without the last axis. BACK: y is multiplied by weight, what the
    normaliser of a token gets is slope [batch, time, READERS * HEADS].
    """
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = blocks_v * ((K + BLOCK_K - 1) // BLOCK_K)
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, part = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    row, span = part // spans, (part % spans).to(tl.int32)
    k = (block // blocks_v) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = (block % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    held = (k < K)[:, None] & (v < V)[None, :]
    place = k[:, None] * V + v[None, :]
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    slopes = tl.zeros([BLOCK_K], tl.float32)
    if not SUMMARY:
        state = tl.load(start + (part * HEADS + head) * K * V + place, mask=held, other=0.0).to(tl.float32)
        if HAS_SLOPE:
            slopes = tl.load(slope_start + (part * HEADS + head) * K + k, mask=k < K, other=0.0).to(tl.float32)
    total = 0.0
    broken = 0
    first = span * length
    last = tl.minimum(first + length, time)
    chunks = tl.cdiv(last - first, C)
    for i in range(chunks):
        chunk = first // C + i
        if BACK:
            chunk = first // C + chunks - 1 - i
        position = chunk * C + tl.arange(0, C)
        exists = position < last
        token = row * time + position
        document, _, latest = documents(reset, token, exists, HAS_RESET)
        here = exists
        if HAS_RESET:
            if BACK:
                here = exists & (document == 0)
            else:
                here = exists & (document == latest)
        high, low, high_all, low_all = _sums(_load_decay(log_decay, token * HEADS + head, here, HAS_DECAY))
        if BACK:
            lasting = tl.exp(high + low)
        else:
            lasting = tl.exp((high_all - high) + (low_all - low))
        through = tl.exp(high_all + low_all)
        if KEEP:
            at = (row * tl.cdiv(time, C) + chunk) * HEADS + head
            tl.store(borders + at * K * V + place, state.to(borders.dtype.element_ty), mask=held)
            if HAS_SLOPE:
                tl.store(slope_borders + at * K + k, slopes, mask=(k < K) & (block % blocks_v == 0))
        if HAS_RESET:
            state = tl.where(latest == 0, through * state, 0.0)
            slopes = tl.where(latest == 0, through * slopes, 0.0)
            broken = tl.maximum(broken, latest)
        else:
            state = through * state
            slopes = through * slopes
        for reader in range(READERS):
            lane = head * READERS + reader
            x_head, y_head = lane * X_HEADS // (HEADS * READERS), lane * Y_HEADS // (HEADS * READERS)
            x_ = load_tile(x, (token * X_HEADS + x_head) * K, k, here[:, None] & (k < K)[None, :], dtype)
            y_ = load_tile(y, (token * Y_HEADS + y_head) * V, v, here[:, None] & (v < V)[None, :], tl.float32)
            factor = lasting
            if HAS_SLOPE:
                times = tl.where(here, lasting, 0.0)
                if BACK:
                    per_lane = token * (HEADS * READERS) + lane
                    factor = lasting * tl.load(weight + per_lane, mask=here, other=0.0)
                    times = lasting * tl.load(slope + per_lane, mask=here, other=0.0)
                slopes += tl.sum(x_.to(tl.float32) * times[:, None], axis=0)
            state = tl.dot(tl.trans(x_), (factor[:, None] * y_).to(dtype), state, input_precision="tf32x3")
        total += high_all
    tl.store(ends + (part * HEADS + head) * K * V + place, state, mask=held)
    if HAS_SLOPE:
        tl.store(slope_ends + (part * HEADS + head) * K + k, slopes, mask=(k < K) & (block % blocks_v == 0))
    if SUMMARY:
        if block == 0:
            tl.store(elapsed + part * HEADS + head, total)
            tl.store(kept + part * HEADS + head, tl.where(broken == 0, 1.0, 0.0))


@triton.jit
def outputs(
    q, k, v, log_decay, reset, borders, slope_borders,
    time,
    out, denominator,
    HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr, HAS_SLOPE: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, LANES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk read: out [batch, time, LANES, V] from the states before the chunks, as of `carry`.

    LANES is the larger number of heads, of queries or states. HAS_SLOPE: divides by the denominators, and writes them,
    [batch, time, LANES], with epsilon.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, lane, part = program % blocks, (program // blocks) % LANES, (program // blocks // LANES).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    head, q_head = lane * HEADS // LANES, lane * Q_HEADS // LANES
    k_head, v_head = lane * K_HEADS // LANES, lane * V_HEADS // LANES
    at = (part * HEADS + head) * K
    m = block * BLOCK_V + tl.arange(0, BLOCK_V)
    position = chunk * C + tl.arange(0, C)
    exists = position < time
    token = row * time + position
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        high, low, _, _ = _sums(_load_decay(log_decay, token * HEADS + head, here, HAS_DECAY))
        score = tl.zeros([C, C], tl.float32)
        found = tl.zeros([C, BLOCK_V], tl.float32)
        divisor = tl.zeros([C], tl.float32)
        for step in range((K + BLOCK_K - 1) // BLOCK_K):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            wide = here[:, None] & (n < K)[None, :]
            q_ = load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
            k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
            score = tl.dot(q_, tl.trans(k_), score, input_precision="tf32x3")
            # What is read of the state before the chunk: only its first document's.
            known = (n < K)[:, None] & (m < V)[None, :] & (current == 0)
            before = tl.load(borders + at * V + n[:, None] * V + m[None, :], mask=known, other=0.0).to(dtype)
            found = tl.dot(q_, before, found, input_precision="tf32x3")
            if HAS_SLOPE:
                slopes = tl.load(slope_borders + at + n, mask=(n < K) & (current == 0), other=0.0)
                divisor += tl.sum(q_.to(tl.float32) * slopes[None, :], axis=1)
        lasting = tl.exp(high + low)
        score = _weighed(score, high, low, C, False)
        long = here[:, None] & (m < V)[None, :]
        v_ = load_tile(v, (token * V_HEADS + v_head) * V, m, long, tl.float32)
        # All tokens of the document would see a NaN: 0 times NaN is NaN. Those from it on are to.
        finite = is_finite(v_)
        bad = bad_rows(finite)
        v_ = tl.where(finite, v_, 0.0).to(dtype)
        found = tl.dot(score.to(dtype), v_, lasting[:, None] * found, input_precision="tf32x3")
        found = nan_from(bad, found)
        if HAS_SLOPE:
            divisor = tl.sum(score, axis=1) + lasting * divisor + EPSILON
            tl.store(denominator + token * LANES + lane, divisor, mask=here & (block == 0))
            found = found / divisor[:, None]
        places = (token * LANES + lane)[:, None] * V + m[None, :]
        tl.store(out + places, found.to(out.dtype.element_ty), mask=long)


@triton.jit
def value_gradients(
    q, k, v, log_decay, reset, dy, weight, slope, borders, slope_borders, late, slope_late,
    time,
    dv, da,
    HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr, HAS_SLOPE: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, LANES: tl.constexpr,
    OF_VALUES: tl.constexpr, OF_DECAY: tl.constexpr, HAS_LATE: tl.constexpr, CORRECTING: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's values and decays, dv [batch, time, LANES, V] and da [batch, time, LANES].

    dy [batch, time, LANES, V] is multiplied by weight, the denominators get slope [batch, time, LANES]; late,
    slope_late are the gradients of the states after the chunks. With G that of this chunk:

        dv = (q k^T * L)^T dy + e * (k G)
        da[r] = sum of (dy v^T * L * q k^T)[t, s] over s < r <= t, of c (dy . q S) over t >= r, of e (v . k G) over
                s < r, and f <S, G>

    OF_VALUES, OF_DECAY: what is wanted. HAS_LATE: whether G is counted, else it is 0. CORRECTING: tokens do not read
    what they write themselves, and -dy is given: the delta rule's reads by the keys.
    """
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    lane, part = program % LANES, (program // LANES).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    head, q_head = lane * HEADS // LANES, lane * Q_HEADS // LANES
    k_head, v_head = lane * K_HEADS // LANES, lane * V_HEADS // LANES
    index = tl.arange(0, C)
    position = chunk * C + index
    exists = position < time
    token = row * time + position
    per_lane = token * LANES + lane
    at = (part * HEADS + head) * K
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        # The state after the chunk counts once, not for each of its readers.
        counted = (current == latest) & (lane % (LANES // HEADS) == 0)
        high, low, high_all, low_all = _sums(_load_decay(log_decay, token * HEADS + head, here, HAS_DECAY))
        since = tl.exp(high + low)
        until = tl.exp((high_all - high) + (low_all - low))
        score = tl.zeros([C, C], tl.float32)
        d_score = tl.zeros([C, C], tl.float32)
        of_before = tl.zeros([C], tl.float32)
        of_after = tl.zeros([C], tl.float32)
        of_whole = 0.0
        if HAS_SLOPE:
            factor = tl.load(weight + per_lane, mask=here, other=0.0)
            d_divisor = tl.load(slope + per_lane, mask=here, other=0.0)
            d_score += d_divisor[:, None]
        for step in range(steps):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            wide = here[:, None] & (n < K)[None, :]
            q_ = load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
            k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
            score = tl.dot(q_, tl.trans(k_), score, input_precision="tf32x3")
            if HAS_SLOPE:
                z = tl.load(slope_borders + at + n, mask=(n < K) & (current == 0), other=0.0)
                dz = tl.load(slope_late + at + n, mask=(n < K) & counted, other=0.0)
                of_before += d_divisor * tl.sum(q_.to(tl.float32) * z[None, :], axis=1)
                of_after += tl.sum(k_.to(tl.float32) * dz[None, :], axis=1)
                of_whole += tl.sum(z * dz)
        score = _weighed(score, high, low, C, CORRECTING)
        for block in range((V + BLOCK_V - 1) // BLOCK_V):
            m = block * BLOCK_V + tl.arange(0, BLOCK_V)
            long = here[:, None] & (m < V)[None, :]
            dy_ = load_tile(dy, per_lane * V, m, long, dtype)
            if HAS_SLOPE:
                dy_ = (factor[:, None] * dy_.to(tl.float32)).to(dtype)
            if CORRECTING:
                dy_ = (-dy_.to(tl.float32)).to(dtype)
            dv_ = tl.zeros([C, BLOCK_V], tl.float32)
            read = tl.zeros([C, BLOCK_V], tl.float32)
            for step in range(steps):
                n = step * BLOCK_K + tl.arange(0, BLOCK_K)
                wide = here[:, None] & (n < K)[None, :]
                held = (n < K)[:, None] & (m < V)[None, :]
                place = at * V + n[:, None] * V + m[None, :]
                if HAS_LATE:
                    k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
                    after = tl.load(late + place, mask=held & counted, other=0.0).to(dtype)
                    dv_ = tl.dot(k_, after, dv_, input_precision="tf32x3")
                if OF_DECAY:
                    q_ = load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
                    before = tl.load(borders + place, mask=held & (current == 0), other=0.0).to(dtype)
                    read = tl.dot(q_, before, read, input_precision="tf32x3")
                    if HAS_LATE:
                        of_whole += tl.sum(before.to(tl.float32) * after.to(tl.float32))
            if OF_DECAY:
                v_ = load_tile(v, (token * V_HEADS + v_head) * V, m, long, dtype)
                of_after += tl.sum(dv_ * v_.to(tl.float32), axis=1)
                of_before += tl.sum(read * dy_.to(tl.float32), axis=1)
                d_score = tl.dot(dy_, tl.trans(v_), d_score, input_precision="tf32x3")
            if OF_VALUES:
                dv_ = tl.dot(tl.trans(score.to(dtype)), dy_, until[:, None] * dv_, input_precision="tf32x3")
                tl.store(dv + per_lane[:, None] * V + m[None, :], dv_.to(dv.dtype.element_ty), mask=long)
        if OF_DECAY:
            earlier = tl.where(index[:, None] < index[None, :], 1.0, 0.0).to(dtype)
            sums = tl.dot((d_score * score).to(dtype), earlier, input_precision="tf32x3")  # over s before r
            sums += (since * of_before)[:, None]
            total = tl.sum(tl.where(index[:, None] >= index[None, :], sums, 0.0), axis=0)
            total += tl.sum(tl.where(index[:, None] < index[None, :], (until * of_after)[:, None], 0.0), axis=0)
            total += tl.exp(high_all + low_all) * of_whole
            tl.store(da + per_lane, total, mask=here)


@triton.jit
def key_gradients(
    q, k, v, log_decay, reset, dy, weight, slope, borders, slope_borders, late, slope_late,
    time,
    dq, dk,
    HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr, HAS_SLOPE: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, LANES: tl.constexpr,
    TOGETHER: tl.constexpr, HAS_LATE: tl.constexpr, CORRECTING: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's queries and keys, summed over TOGETHER lanes that share them.

    dq and dk [batch, time, LANES / TOGETHER, K]; all else as in `value_gradients`. With X = dy v^T * L:

        dq = X k + c * (dy S^T)         dk = X^T q + e * (v G^T)
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    groups: tl.constexpr = LANES // TOGETHER
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, group, part = program % blocks, (program // blocks) % groups, (program // blocks // groups).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    q_head, k_head = group * TOGETHER * Q_HEADS // LANES, group * TOGETHER * K_HEADS // LANES
    n = block * BLOCK_K + tl.arange(0, BLOCK_K)
    position = chunk * C + tl.arange(0, C)
    exists = position < time
    token = row * time + position
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        pairs = tl.zeros([C, C], tl.float32)
        dq_ = tl.zeros([C, BLOCK_K], tl.float32)
        dk_ = tl.zeros([C, BLOCK_K], tl.float32)
        for i in range(TOGETHER):
            lane = group * TOGETHER + i
            head, v_head = lane * HEADS // LANES, lane * V_HEADS // LANES
            at = (part * HEADS + head) * K
            per_lane = token * LANES + lane
            counted = (current == latest) & (lane % (LANES // HEADS) == 0)
            high, low, high_all, low_all = _sums(_load_decay(log_decay, token * HEADS + head, here, HAS_DECAY))
            since = tl.exp(high + low)
            until = tl.exp((high_all - high) + (low_all - low))
            d_score = tl.zeros([C, C], tl.float32)
            if HAS_SLOPE:
                factor = tl.load(weight + per_lane, mask=here, other=0.0)
                d_divisor = tl.load(slope + per_lane, mask=here, other=0.0)
                z = tl.load(slope_borders + at + n, mask=(n < K) & (current == 0), other=0.0)
                dz = tl.load(slope_late + at + n, mask=(n < K) & counted, other=0.0)
                d_score += d_divisor[:, None]
                dq_ += (since * d_divisor)[:, None] * z[None, :]
                dk_ += tl.where(here, until, 0.0)[:, None] * dz[None, :]
            for step in range((V + BLOCK_V - 1) // BLOCK_V):
                m = step * BLOCK_V + tl.arange(0, BLOCK_V)
                long = here[:, None] & (m < V)[None, :]
                v_ = load_tile(v, (token * V_HEADS + v_head) * V, m, long, dtype)
                dy_ = load_tile(dy, per_lane * V, m, long, dtype)
                if HAS_SLOPE:
                    dy_ = (factor[:, None] * dy_.to(tl.float32)).to(dtype)
                if CORRECTING:
                    dy_ = (-dy_.to(tl.float32)).to(dtype)
                d_score = tl.dot(dy_, tl.trans(v_), d_score, input_precision="tf32x3")
                held = (n < K)[:, None] & (m < V)[None, :]
                place = at * V + n[:, None] * V + m[None, :]
                before = tl.load(borders + place, mask=held & (current == 0), other=0.0).to(dtype)
                moved = (since[:, None] * dy_.to(tl.float32)).to(dtype)
                dq_ = tl.dot(moved, tl.trans(before), dq_, input_precision="tf32x3")
                if HAS_LATE:
                    after = tl.load(late + place, mask=held & counted, other=0.0).to(dtype)
                    moved = (until[:, None] * v_.to(tl.float32)).to(dtype)
                    dk_ = tl.dot(moved, tl.trans(after), dk_, input_precision="tf32x3")
            pairs += _weighed(d_score, high, low, C, CORRECTING)
        wide = here[:, None] & (n < K)[None, :]
        pairs = pairs.to(dtype)
        k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
        dq_ = tl.dot(pairs, k_, dq_, input_precision="tf32x3")
        q_ = load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
        dk_ = tl.dot(tl.trans(pairs), q_, dk_, input_precision="tf32x3")
        places = (token * groups + group)[:, None] * K + n[None, :]
        tl.store(dq + places, dq_.to(dq.dtype.element_ty), mask=wide)
        tl.store(dk + places, dk_.to(dk.dtype.element_ty), mask=wide)


@triton.jit
def _inverse(lower, C: tl.constexpr, NARROW: tl.constexpr):
    """(1 + lower)^-1 of a strictly lower triangle [C, C].

    Blocks of 16 on the diagonal row by row, D; the others from the series of Z = D^-1 (what is below), which ends.
    """
    N: tl.constexpr = C // 16
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    blocks = tl.sum(tl.where(same, tl.reshape(lower, [N, 16, N, 16]), 0.0), axis=2)
    inverse = tl.where(row == column, 1.0, tl.zeros([N, 16, 16], tl.float32))
    for i in range(1, 16):
        factors = tl.sum(tl.where(row == i, blocks, 0.0), axis=1)
        change = tl.sum(factors[:, :, None] * inverse, axis=1)
        inverse = tl.where(row == i, inverse - change[:, None, :], inverse)
    spread = tl.where(same, tl.broadcast_to(inverse[:, :, None, :], [N, 16, N, 16]), 0.0)
    diagonal = tl.reshape(spread, [C, C])
    if N == 1:
        return diagonal
    block = tl.arange(0, C) // 16
    below = tl.where(block[:, None] > block[None, :], lower, 0.0)
    precision: tl.constexpr = "tf32" if NARROW else "tf32x3"  # what becomes bfloat16 needs no more
    z = tl.dot(diagonal, below, input_precision=precision)
    result = diagonal
    if N > 2:
        result += tl.dot(tl.dot(z, z, input_precision=precision), diagonal, input_precision=precision)
    return result - tl.dot(z, result, input_precision=precision)


@triton.jit
def solve(
    k, v, log_decay, beta, reset,
    time,
    inverse, w, u,
    HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the delta rule writes in a chunk, as far as it does not depend on the state S before the chunk.

    It writes k^T (e * U) with U = u - w S (arXiv 2412.06464, section 3.3), beta [batch, time, HEADS], and

        T = (1 + beta * L * k k^T, strictly below the diagonal)^-1        w = T (beta c * k)        u = T (beta * v)

    Writes T, inverse [batch, chunks, HEADS, C, C], w [batch, time, HEADS, K] and u [batch, time, HEADS, V].
    """
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    head, part = program % HEADS, (program // HEADS).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    k_head, v_head = head * K_HEADS // HEADS, head * V_HEADS // HEADS
    index = tl.arange(0, C)
    position = chunk * C + index
    exists = position < time
    token = row * time + position
    per_head = token * HEADS + head
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        decay = _load_decay(log_decay, per_head, here, HAS_DECAY)
        strength = tl.load(beta + per_head, mask=here, other=0.0).to(tl.float32)
        # What is not a number is left out, and afterwards put into the rows that it reaches: those from it on.
        bad = (is_finite(decay) & is_finite(strength)) == 0
        high, low, _, _ = _sums(tl.where(is_finite(decay), decay, 0.0))
        strength = tl.where(bad, 0.0, strength)
        product = tl.zeros([C, C], tl.float32)
        for step in range((K + BLOCK_K - 1) // BLOCK_K):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, here[:, None] & (n < K)[None, :], tl.float32)
            bad = bad | bad_rows(is_finite(k_))
            k_ = tl.where(is_finite(k_), k_, 0.0).to(dtype)
            product = tl.dot(k_, tl.trans(k_), product, input_precision="tf32x3")
        solved = _inverse(_weighed(strength[:, None] * product, high, low, C, True), C, NARROW)
        places = (part * HEADS + head) * C * C + index[:, None] * C + index[None, :]
        solved = tl.where(here[None, :], solved, 0.0).to(dtype)
        tl.store(inverse + places, solved, mask=here[:, None] & (index < C)[None, :])
        for step in range((V + BLOCK_V - 1) // BLOCK_V):
            m = step * BLOCK_V + tl.arange(0, BLOCK_V)
            long = here[:, None] & (m < V)[None, :]
            v_ = load_tile(v, (token * V_HEADS + v_head) * V, m, long, tl.float32)
            finite = is_finite(v_)
            v_ = (strength[:, None] * tl.where(finite, v_, 0.0)).to(dtype)
            u_ = nan_from(bad | bad_rows(finite), tl.dot(solved, v_, input_precision="tf32x3"))
            tl.store(u + per_head[:, None] * V + m[None, :], u_.to(u.dtype.element_ty), mask=long)
        lasting = tl.where(current == 0, strength * tl.exp(high + low), 0.0)
        for step in range((K + BLOCK_K - 1) // BLOCK_K):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            wide = here[:, None] & (n < K)[None, :]
            k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, wide, tl.float32)
            k_ = (lasting[:, None] * tl.where(is_finite(k_), k_, 0.0)).to(dtype)
            w_ = nan_from(bad, tl.dot(solved, k_, input_precision="tf32x3"))
            tl.store(w + per_head[:, None] * K + n[None, :], w_.to(w.dtype.element_ty), mask=wide)


@triton.jit
def carry_delta(
    x, y, w, k, local, log_decay, reset, start,
    time,
    borders, ends, corrected,
    BACK: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, X_HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The delta rule's state chunk by chunk, start and ends [batch, HEADS, K, V], and what is written.

    From `solve`, with x the keys and y its u: U = u - w S; S becomes f S + k^T (e * U). Writes borders [batch, chunks,
    HEADS, K, V], S before each chunk, and U, corrected [batch, time, HEADS, V].
    BACK: from the end, with x the queries, y the gradient of out and local [batch, time, HEADS, V] that of U by reads
    in its chunk: D = local + e * (k G); G becomes f G + q^T (c * dy) - w^T D. Writes G after each chunk, and D.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, row = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    x_head, k_head = head * X_HEADS // HEADS, head * K_HEADS // HEADS
    n = tl.arange(0, BLOCK_K)
    m = block * BLOCK_V + tl.arange(0, BLOCK_V)
    held = (n < K)[:, None] & (m < V)[None, :]
    place = n[:, None] * V + m[None, :]
    state = tl.load(start + (row * HEADS + head) * K * V + place, mask=held, other=0.0).to(tl.float32)
    chunks = tl.cdiv(time, C)
    for i in range(chunks):
        chunk = i
        if BACK:
            chunk = chunks - 1 - i
        position = chunk * C + tl.arange(0, C)
        exists = position < time
        token = row * time + position
        per_head = token * HEADS + head
        document, _, latest = documents(reset, token, exists, HAS_RESET)
        early, late = exists, exists  # the tokens that the state before the chunk reaches; that reach the one after it
        if HAS_RESET:
            early, late = exists & (document == 0), exists & (document == latest)
        high, low, high_all, low_all = _sums(_load_decay(log_decay, per_head, late, HAS_DECAY))
        until = tl.exp((high_all - high) + (low_all - low))
        through = tl.exp(high_all + low_all)
        since = until
        if BACK:
            if HAS_RESET:
                high, low, _, _ = _sums(_load_decay(log_decay, per_head, early, HAS_DECAY))
            since = tl.exp(high + low)
        at = ((row * chunks + chunk) * HEADS + head) * K * V
        tl.store(borders + at + place, state.to(borders.dtype.element_ty), mask=held)
        long = exists[:, None] & (m < V)[None, :]
        w_ = load_tile(w, per_head * K, n, early[:, None] & (n < K)[None, :], dtype)
        places = per_head[:, None] * V + m[None, :]
        kept = state * through
        if HAS_RESET:
            kept = tl.where(latest == 0, kept, 0.0)
        if BACK:
            k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, late[:, None] & (n < K)[None, :], dtype)
            found = until[:, None] * tl.dot(k_, state.to(dtype), input_precision="tf32x3")
            u_ = load_tile(local, per_head * V, m, long, tl.float32) + tl.where(late[:, None], found, 0.0)
            x_ = load_tile(x, (token * X_HEADS + x_head) * K, n, early[:, None] & (n < K)[None, :], dtype)
            y_ = load_tile(y, per_head * V, m, early[:, None] & (m < V)[None, :], tl.float32)
            state = tl.dot(tl.trans(x_), (since[:, None] * y_).to(dtype), kept, input_precision="tf32x3")
            moved = tl.where(early[:, None], -u_, 0.0).to(dtype)
            state = tl.dot(tl.trans(w_), moved, state, input_precision="tf32x3")
        else:
            found = tl.dot(w_, state.to(dtype), input_precision="tf32x3")
            u_ = load_tile(y, per_head * V, m, long, tl.float32) - tl.where(early[:, None], found, 0.0)
            x_ = load_tile(x, (token * X_HEADS + x_head) * K, n, late[:, None] & (n < K)[None, :], dtype)
            moved = tl.where(late[:, None], until[:, None] * u_, 0.0).to(dtype)
            state = tl.dot(tl.trans(x_), moved, kept, input_precision="tf32x3")
        tl.store(corrected + places, u_.to(corrected.dtype.element_ty), mask=long)
    tl.store(ends + (row * HEADS + head) * K * V + place, state, mask=held)


@triton.jit
def corrections(
    k, v, log_decay, beta, reset, inverse, u, du, borders,
    time,
    dv, dbeta,
    HAS_DECAY: tl.constexpr, HAS_RESET: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of the delta rule's v and beta from that of U, du [batch, time, HEADS, V].

    With R = T^T dU: dv = beta * R [batch, time, HEADS, V], and dbeta is R . (v - what the key finds) [batch, time,
    HEADS]. The gradient of what the keys find is -dv.
    """
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head, part = program % HEADS, (program // HEADS).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    k_head, v_head = head * K_HEADS // HEADS, head * V_HEADS // HEADS
    index = tl.arange(0, C)
    position = chunk * C + index
    exists = position < time
    token = row * time + position
    per_head = token * HEADS + head
    at = (part * HEADS + head) * K * V
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        high, low, _, _ = _sums(_load_decay(log_decay, per_head, here, HAS_DECAY))
        since = tl.exp(high + low)
        strength = tl.load(beta + per_head, mask=here, other=0.0).to(tl.float32)
        score = tl.zeros([C, C], tl.float32)
        for step in range(steps):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, here[:, None] & (n < K)[None, :], dtype)
            score = tl.dot(k_, tl.trans(k_), score, input_precision="tf32x3")
        score = _weighed(score, high, low, C, True)
        places = (part * HEADS + head) * C * C + index[:, None] * C + index[None, :]
        solved = tl.load(inverse + places, mask=here[:, None] & here[None, :], other=0.0)
        of_strength = tl.zeros([C], tl.float32)
        for block in range((V + BLOCK_V - 1) // BLOCK_V):
            m = block * BLOCK_V + tl.arange(0, BLOCK_V)
            long = here[:, None] & (m < V)[None, :]
            found = tl.zeros([C, BLOCK_V], tl.float32)
            for step in range(steps):
                n = step * BLOCK_K + tl.arange(0, BLOCK_K)
                k_ = load_tile(k, (token * K_HEADS + k_head) * K, n, here[:, None] & (n < K)[None, :], dtype)
                known = (n < K)[:, None] & (m < V)[None, :] & (current == 0)
                before = tl.load(borders + at + n[:, None] * V + m[None, :], mask=known, other=0.0).to(dtype)
                found = tl.dot(k_, before, found, input_precision="tf32x3")
            u_ = load_tile(u, per_head * V, m, long, dtype)
            found = tl.dot(score.to(dtype), u_, since[:, None] * found, input_precision="tf32x3")
            du_ = load_tile(du, per_head * V, m, long, dtype)
            result = tl.dot(tl.trans(solved), du_, input_precision="tf32x3")
            v_ = load_tile(v, (token * V_HEADS + v_head) * V, m, long, tl.float32)
            of_strength += tl.sum(result * (v_ - found), axis=1)
            result = strength[:, None] * result
            tl.store(dv + per_head[:, None] * V + m[None, :], result.to(dv.dtype.element_ty), mask=long)
        tl.store(dbeta + per_head, of_strength, mask=here)


@triton.jit
def segment_sums(
    x, y, weight, slope, kind,
    time, tile, tiles,
    matrices, vectors,
    HAS_MATRICES: tl.constexpr, HAS_VECTORS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SLOPE: tl.constexpr,
    NARROW: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, READERS: tl.constexpr,
    X_HEADS: tl.constexpr, Y_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums over the tokens of a tile of each of two kinds, 0 and 1: of weight x y^T, and of slope x.

    x [batch, time, X_HEADS, K], y [batch, time, Y_HEADS, V], weight and slope [batch, time, HEADS * READERS], 1 where
    absent, kind int8 [batch, time]. Writes matrices [batch, tiles, 2, PARTS, HEADS, K, V] and vectors, without V.
    """
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = blocks_v * ((K + BLOCK_K - 1) // BLOCK_K)
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, place = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    part, wanted = (place % PARTS).to(tl.int32), ((place // PARTS) % 2).to(tl.int32)
    number, row = (place // PARTS // 2 % tiles).to(tl.int32), place // PARTS // 2 // tiles
    n = (block // blocks_v) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = (block % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    matrix = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    vector = tl.zeros([BLOCK_K], tl.float32)
    steps = tl.cdiv(tl.cdiv(tile, C), PARTS)
    last = tl.minimum((number + 1) * tile, time)
    for step in range(steps):
        position = number * tile + (part * steps + step) * C + tl.arange(0, C)
        token = row * time + position
        here = tl.load(kind + token, mask=position < last, other=2) == wanted
        if tl.max(here.to(tl.int32)) > 0:
            for reader in range(READERS):
                lane = head * READERS + reader
                x_head, y_head = lane * X_HEADS // (HEADS * READERS), lane * Y_HEADS // (HEADS * READERS)
                x_ = load_tile(x, (token * X_HEADS + x_head) * K, n, here[:, None] & (n < K)[None, :], dtype)
                if HAS_VECTORS:
                    factor = tl.where(here, 1.0, 0.0)
                    if HAS_SLOPE:
                        factor = tl.load(slope + token * (HEADS * READERS) + lane, mask=here, other=0.0)
                    vector += tl.sum(x_.to(tl.float32) * factor[:, None], axis=0)
                if HAS_MATRICES:
                    y_ = load_tile(y, (token * Y_HEADS + y_head) * V, m, here[:, None] & (m < V)[None, :], tl.float32)
                    if HAS_WEIGHT:
                        y_ *= tl.load(weight + token * (HEADS * READERS) + lane, mask=here, other=0.0)[:, None]
                    matrix = tl.dot(tl.trans(x_), y_.to(dtype), matrix, input_precision="tf32x3")
    at = (place * HEADS + head) * K
    if HAS_MATRICES:
        held = (n < K)[:, None] & (m < V)[None, :]
        tl.store(matrices + at * V + n[:, None] * V + m[None, :], matrix, mask=held)
    if HAS_VECTORS:
        tl.store(vectors + at + n, vector, mask=(n < K) & (block % blocks_v == 0))


@triton.jit
def _load_matrix(
    start, n, m, WIDTH: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """[n, m] of a matrix [WIDTH, OUT], which may lie TRANSPOSED in memory."""
    if TRANSPOSED:
        places = m[None, :] * WIDTH + n[:, None]
    else:
        places = n[:, None] * OUT + m[None, :]
    return tl.load(start + places, mask=(n < WIDTH)[:, None] & (m < OUT)[None, :], other=0.0).to(dtype)


@triton.jit
def segment_reads(
    x, matrices, vectors, weight, slope, kind,
    time, tile, tiles,
    out, denominator,
    HAS_MATRICES: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SLOPE: tl.constexpr, DIVIDE: tl.constexpr,
    NARROW: tl.constexpr, C: tl.constexpr, RUN: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
    X_HEADS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What each token finds in the matrix of its tile and kind: out = weight x M + slope z; 0 for kinds but 0 and 1.

    x [batch, time, X_HEADS, WIDTH], matrices [batch, tiles, 2, HEADS, WIDTH, OUT] (the last two TRANSPOSED), vectors
    [batch, tiles, 2, HEADS, OUT], weight, slope, kind as in `segment_sums`. Writes out [batch, time, LANES, OUT].
    DIVIDE: out = x M / (x z + epsilon), or x z + epsilon alone without matrices, with z of WIDTH; and these
    denominators [batch, time, LANES].
    """
    blocks: tl.constexpr = (OUT + BLOCK_V - 1) // BLOCK_V
    WHOLE: tl.constexpr = BLOCK_K >= WIDTH
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    runs = tl.cdiv(tile, RUN * C)
    block, lane, place = program % blocks, (program // blocks) % LANES, (program // blocks // LANES).to(tl.int64)
    run, number, row = (place % runs).to(tl.int32), (place // runs % tiles).to(tl.int32), place // runs // tiles
    head, x_head = lane * HEADS // LANES, lane * X_HEADS // LANES
    n = tl.arange(0, BLOCK_K)
    m = block * BLOCK_V + tl.arange(0, BLOCK_V)
    start = number * tile + run * RUN * C
    last = tl.minimum(tl.minimum((number + 1) * tile, time), start + RUN * C)
    for wanted in range(2):
        at = ((row * tiles + number) * 2 + wanted) * HEADS + head
        first = matrices + at * WIDTH * OUT
        if HAS_MATRICES & WHOLE:
            matrix = _load_matrix(first, n, m, WIDTH, OUT, TRANSPOSED, dtype)
        if HAS_SLOPE:
            z = tl.load(vectors + at * OUT + m, mask=m < OUT, other=0.0)
        for step in range(RUN):
            position = start + step * C + tl.arange(0, C)
            token = row * time + position
            found = tl.load(kind + token, mask=position < last, other=3)
            here = found == wanted
            if wanted == 0:
                stored = here | (found == 2)
            else:
                stored = here
            if tl.max(stored.to(tl.int32)) > 0:
                per_lane = token * LANES + lane
                result = tl.zeros([C, BLOCK_V], tl.float32)
                divisor = tl.zeros([C], tl.float32)
                for part in range((WIDTH + BLOCK_K - 1) // BLOCK_K):
                    k = part * BLOCK_K + n
                    wide = here[:, None] & (k < WIDTH)[None, :]
                    x_ = load_tile(x, (token * X_HEADS + x_head) * WIDTH, k, wide, dtype)
                    if HAS_MATRICES:
                        if not WHOLE:
                            matrix = _load_matrix(first, k, m, WIDTH, OUT, TRANSPOSED, dtype)
                        result = tl.dot(x_, matrix, result, input_precision="tf32x3")
                    if DIVIDE:
                        divided = tl.load(vectors + at * WIDTH + k, mask=k < WIDTH, other=0.0)
                        divisor += tl.sum(x_.to(tl.float32) * divided[None, :], axis=1)
                if HAS_WEIGHT:
                    result *= tl.load(weight + per_lane, mask=here, other=0.0)[:, None]
                if HAS_SLOPE:
                    result += tl.load(slope + per_lane, mask=here, other=0.0)[:, None] * z[None, :]
                if DIVIDE:
                    divisor = tl.where(here, divisor + EPSILON, 1.0)
                    tl.store(denominator + per_lane, divisor, mask=stored & (block == 0))
                    result = result / divisor[:, None]
                if HAS_MATRICES | HAS_SLOPE:
                    result = tl.where(here[:, None], result, 0.0)
                    places = per_lane[:, None] * OUT + m[None, :]
                    tl.store(out + places, result.to(out.dtype.element_ty), mask=stored[:, None] & (m < OUT)[None, :])
