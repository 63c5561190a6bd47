"""The chunked memory with a decay a key channel, gated linear attention: the Triton kernels for NVIDIA GPUs.

As in `triton_kernels`, with vectors over K for what decays leave. Within a chunk (arXiv 2312.06635, section 4)

    P[t, s] = sum over n of q[t, n] k[s, n] exp(a[s+1, n] + .. + a[t, n])  for s <= t, else 0
    out = P v + (c * q) S           S after the chunk = f S + (e * k)^T v

with c, e and f as there, each [.., K]. For any two tokens s < t there is one h, a power of two, such that both lie in
one block of 2 h tokens, s in its left half and t in its right one. So with E_h of a token the sum of a from its half's
start up to it in right halves, after it to its half's end in left ones, and D_h = exp(E_h),

    P = diag(q . k) + sum over h of M_h * (D_h * q) (D_h * k)^T

where M_h marks the pairs of h. Each E_h is a product of a matrix of 0 and 1 with a: no sum has tokens that are not
between the two, nothing is subtracted, and no exponent is above 0.
"""

import triton
import triton.language as tl

from lcx_kernels.chunked_memory.triton_tiles import LOWEST, bad_rows, documents, is_finite, load_tile, nan_from


@triton.jit
def _load_decays(log_decay, rows, columns, mask):
    """A tile of log-decays with finite numbers alone, and its rows with a NaN."""
    tile = tl.load(log_decay + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    known = tile == tile
    return tl.where(known, tl.maximum(tile, LOWEST), 0.0), bad_rows(known)


@triton.jit
def _sums_of(matrix, tile):
    """Sums of rows that a matrix of 0 and 1 picks, of the three bfloat16 parts of float32: nothing is lost."""
    matrix = matrix.to(tl.bfloat16)
    high = tile.to(tl.bfloat16)
    tile = tile - high.to(tl.float32)
    middle = tile.to(tl.bfloat16)
    sums = tl.dot(matrix, (tile - middle.to(tl.float32)).to(tl.bfloat16))
    sums = tl.dot(matrix, middle, sums)
    return tl.dot(matrix, high, sums)


@triton.jit
def _upto(C: tl.constexpr):
    """Of 0 and 1: [t, r] is r <= t; by it a becomes the sum up to each token."""
    i = tl.arange(0, C)
    return tl.where(i[None, :] <= i[:, None], 1.0, 0.0)


@triton.jit
def _after(C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.where(i[None, :] > i[:, None], 1.0, 0.0)


@triton.jit
def _halves(decays, level, LEVELS: tl.constexpr, C: tl.constexpr):
    """(the matrix that a becomes E_h by, D_h, M_h) for h of 2^level.

    LEVELS is that of the whole chunk: there, and one further, it is all in a left half, and all in a right one.
    """
    i = tl.arange(0, C) + tl.where(level > LEVELS, C, 0)
    shift = tl.minimum(level, LEVELS)
    row, column = i[:, None], i[None, :]
    half, other = row >> shift, column >> shift
    right = (half & 1) == 1
    stretch = tl.where((half == other) & (right == (column <= row)), 1.0, 0.0)
    return stretch, tl.exp(_sums_of(stretch, decays)), right & (other + 1 == half)


@triton.jit
def _pair_products(score, q_, k_, decays, LEVELS: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr):
    """P with what a block of channels adds to it."""
    i = tl.arange(0, C)
    score += tl.where(i[:, None] == i[None, :], tl.sum(q_ * k_, axis=1)[:, None], 0.0)
    for level in range(LEVELS):  # at run time, so that no matrix but one is in registers
        _, lasting, pairs = _halves(decays, level, LEVELS, C)
        late, early = (lasting * q_).to(dtype), (lasting * k_).to(dtype)
        score += tl.where(pairs, tl.dot(late, tl.trans(early), input_precision="tf32x3"), 0.0)
    return score


@triton.jit
def channel_carry(
    x, y, log_decay, reset, start,
    time, length, spans,
    borders, ends, elapsed, kept,
    BACK: tl.constexpr, KEEP: tl.constexpr, SUMMARY: tl.constexpr, HAS_RESET: tl.constexpr, NARROW: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state chunk by chunk through a span of the row's time: S becomes f S + (e * x)^T y.

    BACK: its gradient from the end, G becomes f G + (c * x)^T y with x the queries and y the gradient of out. x and
    log_decay [batch, time, HEADS, K], y [batch, time, HEADS, V], reset int8 [batch, time], start [batch, spans, HEADS,
    K, V]. Writes ends [batch, spans, HEADS, K, V]; KEEP: borders [batch, chunks, HEADS, K, V], the state before each
    chunk, with BACK the gradient of that after it. SUMMARY: starts from zero, writes the sums of the decays, elapsed
    [batch, spans, HEADS, K], and 0 or 1 whether anything lasts, kept [batch, spans, HEADS].
    """
    blocks_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks: tl.constexpr = blocks_v * ((K + BLOCK_K - 1) // BLOCK_K)
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, part = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    row, span = part // spans, (part % spans).to(tl.int32)
    n = (block // blocks_v) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = (block % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    held = (n < K)[:, None] & (m < V)[None, :]
    place = n[:, None] * V + m[None, :]
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if not SUMMARY:
        state = tl.load(start + (part * HEADS + head) * K * V + place, mask=held, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
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
        wide = here[:, None] & (n < K)[None, :]
        per_head = token * HEADS + head
        decays, bad = _load_decays(log_decay, per_head * K, n, wide)
        if BACK:
            lasting = tl.exp(_sums_of(_upto(C), decays))
        else:
            lasting = tl.exp(_sums_of(_after(C), decays))
        whole = tl.sum(decays, axis=0)
        if KEEP:
            at = (row * tl.cdiv(time, C) + chunk) * HEADS + head
            tl.store(borders + at * K * V + place, state.to(borders.dtype.element_ty), mask=held)
        state = tl.exp(whole)[:, None] * state
        if HAS_RESET:
            state = tl.where(latest == 0, state, 0.0)
            broken = tl.maximum(broken, latest)
        x_ = load_tile(x, per_head * K, n, wide, tl.float32) * lasting
        x_ = tl.where(bad[:, None], float("nan"), x_).to(dtype)
        y_ = load_tile(y, per_head * V, m, here[:, None] & (m < V)[None, :], dtype)
        state = tl.dot(tl.trans(x_), y_, state, input_precision="tf32x3")
        total += whole
    tl.store(ends + (part * HEADS + head) * K * V + place, state, mask=held)
    if SUMMARY:
        tl.store(elapsed + (part * HEADS + head) * K + n, total, mask=(n < K) & (block % blocks_v == 0))
        if block == 0:
            tl.store(kept + part * HEADS + head, tl.where(broken == 0, 1.0, 0.0))


@triton.jit
def channel_outputs(
    q, k, v, log_decay, reset, borders,
    time,
    out,
    HAS_RESET: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk read: out [batch, time, HEADS, V], from the states before the chunks."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, part = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    m = block * BLOCK_V + tl.arange(0, BLOCK_V)
    position = chunk * C + tl.arange(0, C)
    exists = position < time
    token = row * time + position
    per_head = token * HEADS + head
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        score = tl.zeros([C, C], tl.float32)
        found = tl.zeros([C, BLOCK_V], tl.float32)
        bad = tl.zeros([C], tl.int32) > 0
        for step in range((K + BLOCK_K - 1) // BLOCK_K):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            wide = here[:, None] & (n < K)[None, :]
            decays, unknown = _load_decays(log_decay, per_head * K, n, wide)
            bad = bad | unknown
            q_ = load_tile(q, per_head * K, n, wide, tl.float32)
            k_ = load_tile(k, per_head * K, n, wide, tl.float32)
            score = _pair_products(score, q_, k_, decays, LEVELS, C, dtype)
            known = (n < K)[:, None] & (m < V)[None, :] & (current == 0)
            at = (part * HEADS + head) * K * V
            before = tl.load(borders + at + n[:, None] * V + m[None, :], mask=known, other=0.0).to(dtype)
            lasting = tl.exp(_sums_of(_upto(C), decays))
            found = tl.dot((lasting * q_).to(dtype), before, found, input_precision="tf32x3")
        long = here[:, None] & (m < V)[None, :]
        v_ = load_tile(v, per_head * V, m, long, tl.float32)
        finite = is_finite(v_)
        bad = bad | bad_rows(finite)
        v_ = tl.where(finite, v_, 0.0).to(dtype)
        found = tl.dot(score.to(dtype), v_, found, input_precision="tf32x3")
        places = per_head[:, None] * V + m[None, :]
        tl.store(out + places, nan_from(bad, found).to(out.dtype.element_ty), mask=long)


@triton.jit
def channel_value_gradients(
    q, k, log_decay, reset, dy, late,
    time,
    dv,
    HAS_RESET: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dv = P^T dy + (e * k) G, with G the gradient of the state after the chunk; [batch, time, HEADS, V]."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, part = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    m = block * BLOCK_V + tl.arange(0, BLOCK_V)
    position = chunk * C + tl.arange(0, C)
    exists = position < time
    token = row * time + position
    per_head = token * HEADS + head
    document, first, latest = documents(reset, token, exists, HAS_RESET)
    for current in range(first, latest + 1):
        here = exists
        if HAS_RESET:
            here = exists & (document == current)
        score = tl.zeros([C, C], tl.float32)
        dv_ = tl.zeros([C, BLOCK_V], tl.float32)
        for step in range((K + BLOCK_K - 1) // BLOCK_K):
            n = step * BLOCK_K + tl.arange(0, BLOCK_K)
            wide = here[:, None] & (n < K)[None, :]
            decays, _ = _load_decays(log_decay, per_head * K, n, wide)
            q_ = load_tile(q, per_head * K, n, wide, tl.float32)
            k_ = load_tile(k, per_head * K, n, wide, tl.float32)
            score = _pair_products(score, q_, k_, decays, LEVELS, C, dtype)
            known = (n < K)[:, None] & (m < V)[None, :] & (current == latest)
            at = (part * HEADS + head) * K * V
            after = tl.load(late + at + n[:, None] * V + m[None, :], mask=known, other=0.0).to(dtype)
            lasting = tl.exp(_sums_of(_after(C), decays))
            dv_ = tl.dot((lasting * k_).to(dtype), after, dv_, input_precision="tf32x3")
        long = here[:, None] & (m < V)[None, :]
        dy_ = load_tile(dy, per_head * V, m, long, dtype)
        dv_ = tl.dot(tl.trans(score.to(dtype)), dy_, dv_, input_precision="tf32x3")
        tl.store(dv + per_head[:, None] * V + m[None, :], dv_.to(dv.dtype.element_ty), mask=long)


@triton.jit
def channel_key_gradients(
    q, k, v, log_decay, reset, dy, borders, late,
    time,
    dq, dk, da,
    HAS_RESET: tl.constexpr, NARROW: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of queries, keys and decays, [batch, time, HEADS, K]. With X_h = M_h * (dy v^T):

        dq = sum over h of D_h * (X_h (D_h * k)) + c * (dy S^T)        dk likewise, with X_h^T, q, e and v G^T

    and what reaches E_h, c, e and f goes back to a by the matrices that they came from.
    """
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    program = tl.program_id(0)
    block, head, part = program % blocks, (program // blocks) % HEADS, (program // blocks // HEADS).to(tl.int64)
    row, chunk = part // tl.cdiv(time, C), (part % tl.cdiv(time, C)).to(tl.int32)
    at = (part * HEADS + head) * K * V
    n = block * BLOCK_K + tl.arange(0, BLOCK_K)
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
        d_score = tl.zeros([C, C], tl.float32)
        dq_ = tl.zeros([C, BLOCK_K], tl.float32)
        dk_ = tl.zeros([C, BLOCK_K], tl.float32)
        whole = tl.zeros([BLOCK_K], tl.float32)
        for step in range((V + BLOCK_V - 1) // BLOCK_V):
            m = step * BLOCK_V + tl.arange(0, BLOCK_V)
            long = here[:, None] & (m < V)[None, :]
            v_ = load_tile(v, per_head * V, m, long, dtype)
            dy_ = load_tile(dy, per_head * V, m, long, dtype)
            d_score = tl.dot(dy_, tl.trans(v_), d_score, input_precision="tf32x3")
            held = (n < K)[:, None] & (m < V)[None, :]
            place = at + n[:, None] * V + m[None, :]
            before = tl.load(borders + place, mask=held & (current == 0), other=0.0).to(dtype)
            after = tl.load(late + place, mask=held & (current == latest), other=0.0).to(dtype)
            dq_ = tl.dot(dy_, tl.trans(before), dq_, input_precision="tf32x3")
            dk_ = tl.dot(v_, tl.trans(after), dk_, input_precision="tf32x3")
            whole += tl.sum(before.to(tl.float32) * after.to(tl.float32), axis=1)
        wide = here[:, None] & (n < K)[None, :]
        decays, _ = _load_decays(log_decay, per_head * K, n, wide)
        q_ = load_tile(q, per_head * K, n, wide, tl.float32)
        k_ = load_tile(k, per_head * K, n, wide, tl.float32)
        own = tl.sum(tl.where(index[:, None] == index[None, :], d_score, 0.0), axis=1)[:, None]
        of_states_q, of_states_k = dq_, dk_
        dq_, dk_ = own * k_, own * q_
        da_ = tl.zeros([C, BLOCK_K], tl.float32) + (tl.exp(tl.sum(decays, axis=0)) * whole)[None, :]
        for level in range(LEVELS + 2):  # the chunk is the left half of twice as many tokens, and then the right one
            stretch, lasting, pairs = _halves(decays, level, LEVELS, C)
            if level < LEVELS:
                chosen = tl.where(pairs, d_score, 0.0).to(dtype)
                late_ = lasting * tl.dot(chosen, (lasting * k_).to(dtype), input_precision="tf32x3")
                early_ = lasting * tl.dot(tl.trans(chosen), (lasting * q_).to(dtype), input_precision="tf32x3")
            else:
                late_ = tl.where(level == LEVELS, 0.0, lasting * of_states_q)
                early_ = tl.where(level == LEVELS, lasting * of_states_k, 0.0)
            da_ += _sums_of(tl.trans(stretch), late_ * q_ + early_ * k_)
            dq_ += late_
            dk_ += early_
        places = per_head[:, None] * K + n[None, :]
        tl.store(dq + places, dq_.to(dq.dtype.element_ty), mask=wide)
        tl.store(dk + places, dk_.to(dk.dtype.element_ty), mask=wide)
        tl.store(da + places, da_, mask=wide)
