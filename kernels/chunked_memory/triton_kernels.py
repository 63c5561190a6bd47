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

# exp of it is 0; what is below it, -inf too, is taken for it: inf - inf would be no number.
LOWEST = tl.constexpr(-1.0e4)
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
def _between(high, low, C: tl.constexpr, STRICT: tl.constexpr):
    """L: the decay from token s to token t, [t, s]; 0 where s is later, STRICT: or the same."""
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    causal = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :] + STRICT
    return tl.where(causal, tl.exp(tl.where(causal, exponent, 0.0)), 0.0)


@triton.jit
def _documents(reset, token, exists, HAS_RESET: tl.constexpr):
    """The number of each token's document, counted from the one that the chunk goes on with, [C]; the first, the last.

    Args: token, its number in the whole array.
    """
    if HAS_RESET:
        marks = tl.load(reset + token, mask=exists, other=0).to(tl.int32)
        document = tl.cumsum(marks, 0)
        return document, tl.min(document), tl.max(document)
    else:
        return tl.zeros_like(exists.to(tl.int32)), 0, 0


@triton.jit
def _load_decay(log_decay, offsets, mask, HAS_DECAY: tl.constexpr):
    if HAS_DECAY:
        return tl.maximum(tl.load(log_decay + offsets, mask=mask, other=0.0).to(tl.float32), LOWEST)
    else:
        return tl.zeros_like(offsets).to(tl.float32)


@triton.jit
def _load_tile(array, rows, columns, mask, dtype: tl.constexpr):
    """[rows, columns] where ``mask``, else 0."""
    return tl.load(array + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(dtype)


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
        document, _, latest = _documents(reset, token, exists, HAS_RESET)
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
            x_ = _load_tile(x, (token * X_HEADS + x_head) * K, k, here[:, None] & (k < K)[None, :], dtype)
            y_ = _load_tile(y, (token * Y_HEADS + y_head) * V, v, here[:, None] & (v < V)[None, :], tl.float32)
            factor = lasting
            if HAS_SLOPE:
                times = tl.where(here, lasting, 0.0)
                if BACK:
                    at = token * (HEADS * READERS) + lane
                    factor = lasting * tl.load(weight + at, mask=here, other=0.0)
                    times = lasting * tl.load(slope + at, mask=here, other=0.0)
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
    document, first, latest = _documents(reset, token, exists, HAS_RESET)
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
            q_ = _load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
            k_ = _load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
            score = tl.dot(q_, tl.trans(k_), score, input_precision="tf32x3")
            # What is read of the state before the chunk: only its first document's.
            known = (n < K)[:, None] & (m < V)[None, :] & (current == 0)
            before = tl.load(borders + at * V + n[:, None] * V + m[None, :], mask=known, other=0.0).to(dtype)
            found = tl.dot(q_, before, found, input_precision="tf32x3")
            if HAS_SLOPE:
                slopes = tl.load(slope_borders + at + n, mask=(n < K) & (current == 0), other=0.0)
                divisor += tl.sum(q_.to(tl.float32) * slopes[None, :], axis=1)
        lasting = tl.exp(high + low)
        score *= _between(high, low, C, False)
        long = here[:, None] & (m < V)[None, :]
        v_ = _load_tile(v, (token * V_HEADS + v_head) * V, m, long, dtype)
        found = tl.dot(score.to(dtype), v_, lasting[:, None] * found, input_precision="tf32x3")
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
    document, first, latest = _documents(reset, token, exists, HAS_RESET)
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
            q_ = _load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
            k_ = _load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
            score = tl.dot(q_, tl.trans(k_), score, input_precision="tf32x3")
            if HAS_SLOPE:
                z = tl.load(slope_borders + at + n, mask=(n < K) & (current == 0), other=0.0)
                dz = tl.load(slope_late + at + n, mask=(n < K) & counted, other=0.0)
                of_before += d_divisor * tl.sum(q_.to(tl.float32) * z[None, :], axis=1)
                of_after += tl.sum(k_.to(tl.float32) * dz[None, :], axis=1)
                of_whole += tl.sum(z * dz)
        score *= _between(high, low, C, CORRECTING)
        for block in range((V + BLOCK_V - 1) // BLOCK_V):
            m = block * BLOCK_V + tl.arange(0, BLOCK_V)
            long = here[:, None] & (m < V)[None, :]
            dy_ = _load_tile(dy, per_lane * V, m, long, dtype)
            if HAS_SLOPE:
                dy_ = (factor[:, None] * dy_.to(tl.float32)).to(dtype)
            if CORRECTING:
                dy_ = -dy_
            dv_ = tl.zeros([C, BLOCK_V], tl.float32)
            read = tl.zeros([C, BLOCK_V], tl.float32)
            for step in range(steps):
                n = step * BLOCK_K + tl.arange(0, BLOCK_K)
                wide = here[:, None] & (n < K)[None, :]
                held = (n < K)[:, None] & (m < V)[None, :]
                place = at * V + n[:, None] * V + m[None, :]
                if HAS_LATE:
                    k_ = _load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
                    after = tl.load(late + place, mask=held & counted, other=0.0).to(dtype)
                    dv_ = tl.dot(k_, after, dv_, input_precision="tf32x3")
                if OF_DECAY:
                    q_ = _load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
                    before = tl.load(borders + place, mask=held & (current == 0), other=0.0).to(dtype)
                    read = tl.dot(q_, before, read, input_precision="tf32x3")
                    if HAS_LATE:
                        of_whole += tl.sum(before.to(tl.float32) * after.to(tl.float32))
            if OF_DECAY:
                v_ = _load_tile(v, (token * V_HEADS + v_head) * V, m, long, dtype)
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
    document, first, latest = _documents(reset, token, exists, HAS_RESET)
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
                v_ = _load_tile(v, (token * V_HEADS + v_head) * V, m, long, dtype)
                dy_ = _load_tile(dy, per_lane * V, m, long, dtype)
                if HAS_SLOPE:
                    dy_ = (factor[:, None] * dy_.to(tl.float32)).to(dtype)
                if CORRECTING:
                    dy_ = -dy_
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
            pairs += d_score * _between(high, low, C, CORRECTING)
        wide = here[:, None] & (n < K)[None, :]
        pairs = pairs.to(dtype)
        k_ = _load_tile(k, (token * K_HEADS + k_head) * K, n, wide, dtype)
        dq_ = tl.dot(pairs, k_, dq_, input_precision="tf32x3")
        q_ = _load_tile(q, (token * Q_HEADS + q_head) * K, n, wide, dtype)
        dk_ = tl.dot(tl.trans(pairs), q_, dk_, input_precision="tf32x3")
        places = (token * groups + group)[:, None] * K + n[None, :]
        tl.store(dq + places, dq_.to(dq.dtype.element_ty), mask=wide)
        tl.store(dk + places, dk_.to(dk.dtype.element_ty), mask=wide)
