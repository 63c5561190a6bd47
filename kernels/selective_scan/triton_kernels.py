"""The selective scan for NVIDIA GPUs: the Triton kernels. `triton_plan` launches them; see there for how they combine.

One program takes a block of channels of one row of the batch through one segment of its time, token by token, with the
state in registers. (The formulas of the backward pass are in `xla`.) What programs share (the gradients of A, B, C, D
and dt_bias) each writes for itself, to be summed outside in a fixed order: no atomics.

Every tile has one axis, with an entry for each thread of the program, so that no compiler has a choice of layouts. LOW
neighbouring threads share a channel; a thread holds PER consecutive numbers of its state, of INNER channels: what there
is of more than one of in a thread is a tuple of tiles, by [channel * PER + number]. Tokens are unrolled GROUP at a
time. Loops load a group of tokens while they compute the one before: too few warps run to hide what memory takes.
Arithmetic is in the dtype of the states, whatever the arrays' own.

EVEN: there are whole groups of tokens, whole blocks of channels and PER * LOW states, so that nothing is masked.

Offsets are int64 from the token's number on: batch x time x channels may exceed 2^31.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# A GPU's own exp2 and division, without steps for results below 2^-126, are of its library: not to be interpreted.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _exp2(x):
    if x.dtype == tl.float32 and not INTERPRETED:
        return libdevice.exp2(x)
    else:
        return tl.exp2(x)


@triton.jit
def _divide(a, b):
    if b.dtype == tl.float32 and not INTERPRETED:
        return libdevice.fast_dividef(a, b)
    else:
        return a / b


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to the last digits also where it is tiny."""
    e = _exp2(-tl.abs(x) * LOG2E)
    if x.dtype == tl.float64:  # log1p(e) = 2 atanh(e / (2 + e)), as a series
        ratio = e / (2 + e)
        square = ratio * ratio
        series = tl.zeros_like(x) + 1.0 / 33
        for i in tl.static_range(1, 17):
            series = series * square + 1.0 / (33 - 2 * i)
        return tl.maximum(x, 0.0) + 2 * ratio * series
    else:  # log1p(e) / e to 5e-9
        series = e * -0.0032440212089568377 + 0.01985144428908825
        series = series * e - 0.056959498673677444
        series = series * e + 0.10603651404380798
        series = series * e - 0.15305590629577637
        series = series * e + 0.1967593878507614
        series = series * e - 0.24954134225845337
        series = series * e + 0.3332996368408203
        series = series * e - 0.4999990165233612
        series = series * e + 1.0
        return e * series + tl.maximum(x, 0.0)


@triton.jit
def _sigmoid(x):
    return _divide(1.0, 1 + _exp2(-x * LOG2E))


@triton.jit
def _silu(x):
    return _divide(x, 1 + _exp2(-x * LOG2E))


@triton.jit
def _program(channels, segments, BLOCK: tl.constexpr):
    """(block, segment, row) of this program; blocks that share B and C are neighbours."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK)
    return program % blocks, (program // blocks) % segments, program // blocks // segments


@triton.jit
def _threads(LOW: tl.constexpr, WARPS: tl.constexpr):
    """(of the threads that share a channel, which this is; the place of its channel)"""
    thread = tl.arange(0, 32 * WARPS)
    return thread % LOW, thread // LOW


@triton.jit
def _sum_over_low(tile, LOW: tl.constexpr):
    """Over the threads that share a channel."""
    if LOW > 1:
        size: tl.constexpr = tile.shape[0]
        sums = tl.sum(tl.reshape(tile, [size // LOW, LOW]), axis=1, keep_dims=True)
        tile = tl.reshape(tl.broadcast_to(sums, [size // LOW, LOW]), [size])
    return tile


@triton.jit
def _sum_over_warp(tile, LOW: tl.constexpr):
    """Over the threads of a warp that hold the same part of a state."""
    size: tl.constexpr = tile.shape[0]
    sums = tl.sum(tl.reshape(tile, [size // 32, 32 // LOW, LOW]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(sums, [size // 32, 32 // LOW, LOW]), [size])


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_over_warps(one, other):
    """Of threads in the same place of their warps; both at once, so that warps meet once."""
    size: tl.constexpr = one.shape[0]
    shape: tl.constexpr = [size // 32, 32]
    if size > 32:
        one, other = tl.reduce((tl.reshape(one, shape), tl.reshape(other, shape)), 0, _add_pairs, keep_dims=True)
        one = tl.reshape(tl.broadcast_to(one, shape), [size])
        other = tl.reshape(tl.broadcast_to(other, shape), [size])
    return one, other


@triton.jit
def _dot(tiles, others, at, PER: tl.constexpr):
    """The sum of products of a channel, in a thread; ``at``: its first number in ``tiles``."""
    even, odd = tiles[at] * others[0], tl.zeros_like(tiles[at])
    for j in tl.static_range(1, PER):
        if j % 2 == 0:
            even += tiles[at + j] * others[j]
        else:
            odd += tiles[at + j] * others[j]
    return even + odd


@triton.jit
def _load(pointer, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0)


@triton.jit
def _load_tokens(pointer, token, stride, here, left, GROUP: tl.constexpr, EVEN: tl.constexpr, HAS: tl.constexpr):
    """Of tokens from ``token``, of which ``left`` exist, what there is one of per channel; () if not HAS."""
    found = ()
    if HAS:
        for i in tl.static_range(GROUP):
            found = found + (_load(pointer + (token * stride + i * stride), here & (i < left), EVEN),)
    return found


@triton.jit
def _load_resets(reset, token, left, GROUP: tl.constexpr, EVEN: tl.constexpr, HAS: tl.constexpr):
    found = ()
    if HAS:
        for i in tl.static_range(GROUP):
            found = found + (_load(reset + (token + i), i < left, EVEN),)
    return found


@triton.jit
def _load_rows(
    pointer, token, low, left,
    STATE: tl.constexpr, PER: tl.constexpr, PACK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    HAS: tl.constexpr,
):  # fmt: skip
    """Of tokens from ``token`` the thread's part of B or C, as it is in memory, PACK numbers at once where it can."""
    found = ()
    if HAS:
        size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        WORD: tl.constexpr = min(PACK, 8 // size)  # numbers that are loaded at once
        place = token * STATE
        for i in tl.static_range(GROUP):
            for j in tl.static_range(0, PER, WORD):
                at = pointer + (place + i * STATE) + (low * PER + j)
                if WORD * size == 8 and WORD > 1:
                    at = at.to(tl.pointer_type(tl.int64), bitcast=True)
                elif WORD * size == 4 and WORD > 1:
                    at = at.to(tl.pointer_type(tl.int32), bitcast=True)
                found = found + (_load(at, (low * PER + j < STATE) & (i < left), EVEN),)
    return found


@triton.jit
def _halves(word):
    """Of an int32 the two bfloat16s, as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _row(words, index: tl.constexpr, of: tl.constexpr, PER: tl.constexpr, PACK: tl.constexpr, dtype: tl.constexpr):
    """Token ``index`` of `_load_rows`, of numbers of dtype ``of``: a tuple of PER tiles."""
    size: tl.constexpr = of.primitive_bitwidth // 8
    WORD: tl.constexpr = min(PACK, 8 // size)
    tiles = ()
    for k in tl.static_range(PER // WORD):
        word = words[index * (PER // WORD) + k]
        if WORD == 1:
            tiles = tiles + (word.to(dtype),)
        elif size == 4:
            first, second = word.to(tl.int32), (word >> 32).to(tl.int32)
            tiles = tiles + (first.to(of, bitcast=True).to(dtype), second.to(of, bitcast=True).to(dtype))
        elif of == tl.bfloat16:
            first, second = _halves(word.to(tl.int32))
            tiles = tiles + (first.to(dtype), second.to(dtype))
            if WORD == 4:
                first, second = _halves((word >> 32).to(tl.int32))
                tiles = tiles + (first.to(dtype), second.to(dtype))
        else:
            for p in tl.static_range(WORD):
                tiles = tiles + ((word >> (16 * p)).to(tl.int16).to(of, bitcast=True).to(dtype),)
    return tiles


@triton.jit
def _load_states(pointer, stride, low, here, STATE: tl.constexpr, PER: tl.constexpr, dtype: tl.constexpr):
    """The thread's part of the states of a channel, ``stride`` apart, from a pointer to the first."""
    tiles = ()
    for j in tl.static_range(PER):
        state = low * PER + j
        tiles = tiles + (tl.load(pointer + state * stride, mask=here & (state < STATE), other=0.0).to(dtype),)
    return tiles


@triton.jit
def _store_states(pointer, stride, low, here, tiles, at, STATE: tl.constexpr, PER: tl.constexpr):
    for j in tl.static_range(PER):
        state = low * PER + j
        tl.store(pointer + state * stride, tiles[at + j], mask=here & (state < STATE))


@triton.jit
def _load_rates(A, low, here, STATE: tl.constexpr, PER: tl.constexpr, dtype: tl.constexpr):
    """A in units of exp2, from a pointer to the channel's first."""
    loaded = _load_states(A, 1, low, here, STATE, PER, dtype)
    rates = ()
    for j in tl.static_range(PER):
        rates = rates + (loaded[j] * LOG2E,)
    return rates


@triton.jit
def _load_parameter(array, channel, here, HAS: tl.constexpr, dtype: tl.constexpr):
    """What there is one of per channel, or 0."""
    if HAS:
        return tl.load(array + channel, mask=here, other=0.0).to(dtype)
    else:
        return tl.zeros_like(channel).to(dtype)


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros_like(like),)
    return tiles


@triton.jit
def _where(condition, tiles, others):
    chosen = ()
    for j in tl.static_range(len(tiles)):
        chosen = chosen + (tl.where(condition, tiles[j], others[j]),)
    return chosen


@triton.jit
def _clear(condition, tiles):
    cleared = ()
    for j in tl.static_range(len(tiles)):
        cleared = cleared + (tl.where(condition, 0.0, tiles[j]),)
    return cleared


@triton.jit
def _step(raw, bias, exists, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr):
    """(the step size of a token, what went into the softplus). Where masked, the step is 0: nothing happens."""
    step = raw.to(bias.dtype)
    if HAS_BIAS:
        step = step + bias
    raw = step
    if SOFTPLUS:
        step = _softplus(raw)
    if not EVEN:
        step = tl.where(exists, step, 0.0)
    return step, raw


@triton.jit
def _decays(step, rates, at, PER: tl.constexpr):
    decays = ()
    for j in tl.static_range(PER):
        decays = decays + (_exp2(step * rates[at + j]),)
    return decays


@triton.jit
def forward(
    x, dt, A, B, C, D, z, dt_bias, reset, initial,
    time, channels, segments, length,
    y, borders, final, dt_sum, kept,
    SUMMARY: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr, BODY: tl.constexpr, GROUP: tl.constexpr,
    STATE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, EVEN: tl.constexpr,
    PER: tl.constexpr, LOW: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The scan of a segment.

    x, dt, z, y [batch, time, channels]; A [channels, STATE]; B, C [batch, time, STATE]; D, dt_bias [channels]; reset
    int8 [batch, time]; initial [batch, segments, channels, STATE]; final [batch, channels, STATE]. What is absent by
    the HAS_ flags is not touched. INNER is 1.
    KEEP: writes the state before each chunk, borders [batch, chunks, STATE, channels].
    SUMMARY: starts from zero, without y; writes final [batch, segments, channels, STATE], dt_sum and kept (0 where a
    reset lies in the segment, else 1) [batch, segments, channels].
    """
    block, segment, row = _program(channels, segments, 32 * WARPS // LOW)
    dtype: tl.constexpr = final.dtype.element_ty
    low, place = _threads(LOW, WARPS)
    channel = block * (32 * WARPS // LOW) + place
    here = channel < channels
    channel, row, part = channel.to(tl.int64), row.to(tl.int64), row.to(tl.int64) * segments + segment
    lone = here & (low == 0)
    rates = _load_rates(A + channel * STATE, low, here, STATE, PER, dtype)
    skip = _load_parameter(D, channel, here, HAS_D, dtype)
    bias = _load_parameter(dt_bias, channel, here, HAS_BIAS, dtype)
    elapsed = tl.zeros_like(bias)
    broken = segment < 0  # whether a reset was met: not yet
    h = _zeros(bias, PER)
    if not SUMMARY:
        h = _load_states(initial + (part * channels + channel) * STATE, 1, low, here, STATE, PER, dtype)
    first = segment * length
    last = tl.minimum(first + length, time)
    head, border = row * time, row * tl.cdiv(time, CHUNK)
    x, dt, z, y, borders = x + channel, dt + channel, z + channel, y + channel, borders + channel

    left = last - first
    raws = _load_tokens(dt, head + first, channels, here, left, BODY, EVEN, True)
    xs = _load_tokens(x, head + first, channels, here, left, BODY, EVEN, True)
    zs = _load_tokens(z, head + first, channels, here, left, BODY, EVEN, HAS_Z)
    resets = _load_resets(reset, head + first, left, BODY, EVEN, HAS_RESET)
    Bs = _load_rows(B, head + first, low, left, STATE, PER, PACK, GROUP, EVEN, True)
    Cs = _load_rows(C, head + first, low, left, STATE, PER, PACK, GROUP, EVEN, HAS_C)
    for start in range(first, last, BODY):
        # What comes next, or where nothing does the same again. A load that is written after a store waits for it.
        ahead = tl.minimum(start + BODY, last - BODY if EVEN else last)
        next_raws = _load_tokens(dt, head + ahead, channels, here, last - ahead, BODY, EVEN, True)
        next_xs = _load_tokens(x, head + ahead, channels, here, last - ahead, BODY, EVEN, True)
        next_zs = _load_tokens(z, head + ahead, channels, here, last - ahead, BODY, EVEN, HAS_Z)
        next_resets = _load_resets(reset, head + ahead, last - ahead, BODY, EVEN, HAS_RESET)
        if KEEP:
            if start % CHUNK == 0:
                at = borders + (border + start // CHUNK) * STATE * channels
                _store_states(at, channels, low, here, h, 0, STATE, PER)
        steps = ()
        for i in tl.static_range(BODY):
            step, _ = _step(raws[i], bias, here & (start + i < last), SOFTPLUS, HAS_BIAS, EVEN)
            steps = steps + (step,)
            elapsed += step
        # Decays are made a token ahead: these take longest.
        next_decays = _decays(steps[0], rates, 0, PER)
        for i in tl.static_range(BODY):
            if i % GROUP == 0:
                rows = ahead if i + GROUP == BODY else start + i + GROUP
                next_Bs = _load_rows(B, head + rows, low, last - rows, STATE, PER, PACK, GROUP, EVEN, True)
                next_Cs = _load_rows(C, head + rows, low, last - rows, STATE, PER, PACK, GROUP, EVEN, HAS_C)
            decays = next_decays
            if i + 1 < BODY:
                next_decays = _decays(steps[i + 1], rates, 0, PER)
            if HAS_RESET:
                h = _clear(resets[i] != 0, h)
                broken = broken | (resets[i] != 0)
            x_ = xs[i].to(dtype)
            exists = here & (start + i < last)
            B_ = _row(Bs, i % GROUP, B.dtype.element_ty, PER, PACK, dtype)
            moved = steps[i] * x_
            after = ()
            for j in tl.static_range(PER):
                after = after + (decays[j] * h[j] + moved * B_[j],)
            h = after
            if HAS_C:
                C_ = _row(Cs, i % GROUP, C.dtype.element_ty, PER, PACK, dtype)
                out = _sum_over_low(_dot(h, C_, 0, PER), LOW)
                if HAS_D:
                    out += skip * x_
                if HAS_Z:
                    out = out * _silu(zs[i].to(dtype))
                at = y + ((head + start) * channels + i * channels)
                if EVEN and LOW == 1:
                    tl.store(at, out.to(y.dtype.element_ty))
                else:
                    tl.store(at, out.to(y.dtype.element_ty), mask=exists & lone)
            if i % GROUP == GROUP - 1:
                Bs, Cs = next_Bs, next_Cs
        raws, xs, zs, resets = next_raws, next_xs, next_zs, next_resets
    if SUMMARY:
        _store_states(final + (part * channels + channel) * STATE, 1, low, here, h, 0, STATE, PER)
        tl.store(dt_sum + part * channels + channel, elapsed, mask=lone)
        tl.store(kept + part * channels + channel, tl.where(broken, 0.0, tl.zeros_like(elapsed) + 1), mask=lone)
    else:
        if segment == segments - 1:
            _store_states(final + (row * channels + channel) * STATE, 1, low, here, h, 0, STATE, PER)


@triton.jit
def adjoint(
    dt, A, C, z, dt_bias, reset, dy,
    time, channels, segments, length,
    early, dt_sum, kept,
    BODY: tl.constexpr, GROUP: tl.constexpr, STATE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_C: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, EVEN: tl.constexpr,
    PER: tl.constexpr, LOW: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, if that of the state after it is 0.

    Writes early [batch, segments, channels, STATE], and dt_sum and kept as `forward` does. Without C there is no dy.
    """
    block, segment, row = _program(channels, segments, 32 * WARPS // LOW)
    dtype: tl.constexpr = early.dtype.element_ty
    low, place = _threads(LOW, WARPS)
    channel = block * (32 * WARPS // LOW) + place
    here = channel < channels
    channel, row, part = channel.to(tl.int64), row.to(tl.int64), row.to(tl.int64) * segments + segment
    lone = here & (low == 0)
    rates = _load_rates(A + channel * STATE, low, here, STATE, PER, dtype)
    bias = _load_parameter(dt_bias, channel, here, HAS_BIAS, dtype)
    elapsed = tl.zeros_like(bias)
    broken = segment < 0
    g = _zeros(bias, PER)
    first = segment * length
    bodies = tl.cdiv(tl.minimum(length, time - first), BODY)
    head = row * time
    dt, z, dy = dt + channel, z + channel, dy + channel

    start = first + (bodies - 1) * BODY
    left = time - start
    raws = _load_tokens(dt, head + start, channels, here, left, BODY, EVEN, True)
    dys = _load_tokens(dy, head + start, channels, here, left, BODY, EVEN, HAS_C)
    zs = _load_tokens(z, head + start, channels, here, left, BODY, EVEN, HAS_Z)
    resets = _load_resets(reset, head + start, left, BODY, EVEN, HAS_RESET)
    rows = start + BODY - GROUP
    Cs = _load_rows(C, head + rows, low, time - rows, STATE, PER, PACK, GROUP, EVEN, HAS_C)
    for body in range(bodies):
        start = first + (bodies - 1 - body) * BODY
        ahead = tl.maximum(start - BODY, first)
        next_raws = _load_tokens(dt, head + ahead, channels, here, time - ahead, BODY, EVEN, True)
        next_dys = _load_tokens(dy, head + ahead, channels, here, time - ahead, BODY, EVEN, HAS_C)
        next_zs = _load_tokens(z, head + ahead, channels, here, time - ahead, BODY, EVEN, HAS_Z)
        next_resets = _load_resets(reset, head + ahead, time - ahead, BODY, EVEN, HAS_RESET)
        steps = ()
        for i in tl.static_range(BODY):
            step, _ = _step(raws[i], bias, here & (start + i < time), SOFTPLUS, HAS_BIAS, EVEN)
            steps = steps + (step,)
            elapsed += step
        next_decays = _decays(steps[BODY - 1], rates, 0, PER)
        for i in tl.static_range(BODY - 1, -1, -1):
            if i % GROUP == GROUP - 1:
                rows = ahead + BODY - GROUP if i + 1 == GROUP else start + i + 1 - 2 * GROUP
                next_Cs = _load_rows(C, head + rows, low, time - rows, STATE, PER, PACK, GROUP, EVEN, HAS_C)
            decays = next_decays
            if i > 0:
                next_decays = _decays(steps[i - 1], rates, 0, PER)
            later = g
            if HAS_C:
                ungated = dys[i].to(dtype)
                if HAS_Z:
                    ungated = ungated * _silu(zs[i].to(dtype))
                C_ = _row(Cs, i % GROUP, C.dtype.element_ty, PER, PACK, dtype)
                later = ()
                for j in tl.static_range(PER):
                    later = later + (g[j] + ungated * C_[j],)
            before = ()
            for j in tl.static_range(PER):
                before = before + (decays[j] * later[j],)
            g = before
            if HAS_RESET:
                g = _clear(resets[i] != 0, g)
                broken = broken | (resets[i] != 0)
            if i % GROUP == 0:
                Cs = next_Cs
        raws, dys, zs, resets = next_raws, next_dys, next_zs, next_resets
    _store_states(early + (part * channels + channel) * STATE, 1, low, here, g, 0, STATE, PER)
    tl.store(dt_sum + part * channels + channel, elapsed, mask=lone)
    tl.store(kept + part * channels + channel, tl.where(broken, 0.0, tl.zeros_like(elapsed) + 1), mask=lone)


@triton.jit
def combine(
    A, edge, ends, dt_sum, kept,
    channels, segments,
    starts, out,
    BACK: tl.constexpr, STATE: tl.constexpr,
    PER: tl.constexpr, LOW: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The state at which each segment starts, from the summaries of the segments; BACK: from the last to the first.

    edge, out [batch, channels, STATE]: the state before the first segment and after the last. ends, starts [batch,
    segments, channels, STATE]: where a segment gets from zero, and what it starts from. dt_sum, kept as of `forward`.
    """
    block, _, row = _program(channels, 1, 32 * WARPS // LOW)
    dtype: tl.constexpr = ends.dtype.element_ty
    low, place = _threads(LOW, WARPS)
    channel = block * (32 * WARPS // LOW) + place
    here = channel < channels
    channel, row = channel.to(tl.int64), row.to(tl.int64)
    rates = _load_rates(A + channel * STATE, low, here, STATE, PER, dtype)
    h = _load_states(edge + (row * channels + channel) * STATE, 1, low, here, STATE, PER, dtype)
    for i in range(segments):
        part = row * segments + i
        if BACK:
            part = row * segments + segments - 1 - i
        end = _load_states(ends + (part * channels + channel) * STATE, 1, low, here, STATE, PER, dtype)
        elapsed = tl.load(dt_sum + part * channels + channel, mask=here, other=0.0)
        keeps = tl.load(kept + part * channels + channel, mask=here, other=0.0) != 0
        _store_states(starts + (part * channels + channel) * STATE, 1, low, here, h, 0, STATE, PER)
        after = ()
        for j in tl.static_range(PER):
            after = after + (tl.where(keeps, _exp2(elapsed * rates[j]) * h[j], 0.0) + end[j],)
        h = after
    _store_states(out + (row * channels + channel) * STATE, 1, low, here, h, 0, STATE, PER)


@triton.jit
def _select(index, tiles, first, COUNT: tl.constexpr):
    """Tile first + index % COUNT of a tuple, by a number that each thread has. COUNT is a power of two."""
    chosen = ()
    for j in tl.static_range(COUNT):
        chosen = chosen + (tiles[first + j],)
    half: tl.constexpr = COUNT // 2
    if half == 0:
        return chosen[0]
    else:
        pairs = ()
        for j in tl.static_range(half):
            pairs = pairs + (tl.where((index & half) != 0, chosen[half + j], chosen[j]),)
        return _select(index, pairs, 0, half)


@triton.jit
def _store_rows(
    dB, dC, low, place, dB_, dC_, exists, HAS_C: tl.constexpr, STATE: tl.constexpr, PER: tl.constexpr, LOW: tl.constexpr
):
    """The sums over all channels of a row of dB and dC. Each thread brings its part to one number, and stores that."""
    OUTER: tl.constexpr = 32 // LOW
    COUNT: tl.constexpr = min(OUTER, PER)
    sums_B, sums_C = (), ()
    for j in tl.static_range(PER):
        sums_B = sums_B + (_sum_over_warp(dB_[j], LOW),)
        if HAS_C:
            sums_C = sums_C + (_sum_over_warp(dC_[j], LOW),)
    for first in tl.static_range(0, PER, COUNT):
        one = _select(place, sums_B, first, COUNT)
        other = one
        if HAS_C:
            other = _select(place, sums_C, first, COUNT)
        one, other = _sum_over_warps(one, other)
        state = low * PER + first + place
        mask = exists & (place < COUNT) & (state < STATE)
        tl.store(dB + state, one, mask=mask)
        if HAS_C:
            tl.store(dC + state, other, mask=mask)


@triton.jit
def backward(
    x, dt, A, B, C, D, z, dt_bias, reset, borders, dy, late,
    time, channels, segments, length,
    dx, ddt, dz, dB, dC, dA, dD, ddt_bias, early,
    CHUNK: tl.constexpr, BODY: tl.constexpr, GROUP: tl.constexpr, STATE: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    EVEN: tl.constexpr,
    PER: tl.constexpr, LOW: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The gradients of a segment, span by span from its end, a span being two groups of tokens or one.

    late [batch, segments, channels, STATE], early [batch, channels, STATE]: gradients of the state after each segment
    and before the first. Written for each block: dB, dC [blocks, batch, time, STATE]; for each segment: dA [batch,
    segments, channels, STATE], dD, ddt_bias [batch, segments, channels]. All else as in `forward`.
    """
    OUTER: tl.constexpr = 32 * WARPS // LOW
    block, segment, row = _program(channels, segments, INNER * OUTER)
    dtype: tl.constexpr = late.dtype.element_ty
    low, place = _threads(LOW, WARPS)
    batch = tl.num_programs(0) // tl.cdiv(channels, INNER * OUTER) // segments
    row, part = row.to(tl.int64), row.to(tl.int64) * segments + segment
    head, border = row * time, row * tl.cdiv(time, CHUNK)
    shift = block * (INNER * OUTER) + place
    x, dt, z, dy, dx, ddt, dz = x + shift, dt + shift, z + shift, dy + shift, dx + shift, ddt + shift, dz + shift
    shared = (block.to(tl.int64) * batch + row) * time
    borders = borders + shift
    rates, g, sum_A, skip, bias, sum_D, sum_bias = (), (), (), (), (), (), ()
    for k in tl.static_range(INNER):
        channel = block * (INNER * OUTER) + k * OUTER + place
        here = channel < channels
        channel = channel.to(tl.int64)
        rates = rates + _load_rates(A + channel * STATE, low, here, STATE, PER, dtype)
        g = g + _load_states(late + (part * channels + channel) * STATE, 1, low, here, STATE, PER, dtype)
        skip = skip + (_load_parameter(D, channel, here, HAS_D, dtype),)
        bias = bias + (_load_parameter(dt_bias, channel, here, HAS_BIAS, dtype),)
        sum_A = sum_A + _zeros(bias[0], PER)
        sum_D, sum_bias = sum_D + _zeros(bias[0], 1), sum_bias + _zeros(bias[0], 1)
    first = segment * length
    spans = tl.cdiv(tl.minimum(length, time - first), BODY)
    for span in range(spans):
        start = first + (spans - 1 - span) * BODY
        h = ()
        kept = borders + (border + start // CHUNK) * STATE * channels
        for k in tl.static_range(INNER):
            here = block * (INNER * OUTER) + k * OUTER + place < channels
            h = h + _load_states(kept + k * OUTER, channels, low, here, STATE, PER, dtype)
        middle = _zeros(
            bias[0], INNER * PER
        )  # not h: what a loop sets to a value that it had, Triton takes for unchanged
        for token in range(start // CHUNK * CHUNK, start + BODY - GROUP, GROUP):
            middle = h
            left = time - token
            Bs = _load_rows(B, head + token, low, left, STATE, PER, PACK, GROUP, EVEN, True)
            resets = _load_resets(reset, head + token, left, GROUP, EVEN, HAS_RESET)
            xs, raws = (), ()
            for k in tl.static_range(INNER):
                here = block * (INNER * OUTER) + k * OUTER + place < channels
                xs = xs + _load_tokens(x + k * OUTER, head + token, channels, here, left, GROUP, EVEN, True)
                raws = raws + _load_tokens(dt + k * OUTER, head + token, channels, here, left, GROUP, EVEN, True)
            moved, decays = (), ()
            for i in tl.static_range(GROUP):
                for k in tl.static_range(INNER):
                    here = block * (INNER * OUTER) + k * OUTER + place < channels
                    step, _ = _step(raws[k * GROUP + i], bias[k], here & (i < left), SOFTPLUS, HAS_BIAS, EVEN)
                    moved = moved + (step * xs[k * GROUP + i].to(dtype),)
                    decays = decays + _decays(step, rates, k * PER, PER)
            for i in tl.static_range(GROUP):
                if HAS_RESET:
                    h = _clear(resets[i] != 0, h)
                B_ = _row(Bs, i, B.dtype.element_ty, PER, PACK, dtype)
                after = ()
                for k in tl.static_range(INNER):
                    for j in tl.static_range(PER):
                        decay = decays[(i * INNER + k) * PER + j]
                        after = after + (decay * h[k * PER + j] + moved[i * INNER + k] * B_[j],)
                h = after
        for back in range(BODY // GROUP):
            token = start + BODY - GROUP - back * GROUP
            h = _where(back == 0, h, middle)
            left = time - token
            Bs = _load_rows(B, head + token, low, left, STATE, PER, PACK, GROUP, EVEN, True)
            Cs = _load_rows(C, head + token, low, left, STATE, PER, PACK, GROUP, EVEN, HAS_C)
            resets = _load_resets(reset, head + token, left, GROUP, EVEN, HAS_RESET)
            xs, raws, zs, dys = (), (), (), ()
            for k in tl.static_range(INNER):
                here = block * (INNER * OUTER) + k * OUTER + place < channels
                xs = xs + _load_tokens(x + k * OUTER, head + token, channels, here, left, GROUP, EVEN, True)
                raws = raws + _load_tokens(dt + k * OUTER, head + token, channels, here, left, GROUP, EVEN, True)
                zs = zs + _load_tokens(z + k * OUTER, head + token, channels, here, left, GROUP, EVEN, HAS_Z)
                dys = dys + _load_tokens(dy + k * OUTER, head + token, channels, here, left, GROUP, EVEN, HAS_C)
            steps, decays = (), ()
            for i in tl.static_range(GROUP):
                for k in tl.static_range(INNER):
                    here = block * (INNER * OUTER) + k * OUTER + place < channels
                    step, _ = _step(raws[k * GROUP + i], bias[k], here & (i < left), SOFTPLUS, HAS_BIAS, EVEN)
                    steps = steps + (step,)
                    decays = decays + _decays(step, rates, k * PER, PER)
            lasting = ()  # of each token what is left of the state before it
            for i in tl.static_range(GROUP):
                if HAS_RESET:
                    h = _clear(resets[i] != 0, h)
                B_ = _row(Bs, i, B.dtype.element_ty, PER, PACK, dtype)
                after = ()
                for k in tl.static_range(INNER):
                    moved = steps[i * INNER + k] * xs[k * GROUP + i].to(dtype)
                    for j in tl.static_range(PER):
                        lasts = decays[(i * INNER + k) * PER + j] * h[k * PER + j]
                        lasting = lasting + (lasts,)
                        after = after + (lasts + moved * B_[j],)
                h = after
            for i in tl.static_range(GROUP - 1, -1, -1):
                B_ = _row(Bs, i, B.dtype.element_ty, PER, PACK, dtype)
                C_ = B_
                if HAS_C:
                    C_ = _row(Cs, i, C.dtype.element_ty, PER, PACK, dtype)
                dB_, dC_ = _zeros(bias[0], PER), _zeros(bias[0], PER)
                g_before, new_sum_A, new_sum_D, new_sum_bias = (), (), (), ()
                for k in tl.static_range(INNER):
                    here = block * (INNER * OUTER) + k * OUTER + place < channels
                    exists = here & (i < left)
                    write = exists & (low == 0)
                    to = k * OUTER + ((head + token) * channels + i * channels)
                    x_, step = xs[k * GROUP + i].to(dtype), steps[i * INNER + k]
                    moved = step * x_
                    h_after, g_after, d_exponent = (), (), ()
                    for j in tl.static_range(PER):
                        h_after = h_after + (lasting[(i * INNER + k) * PER + j] + moved * B_[j],)
                    dx_, d_D = tl.zeros_like(step), tl.zeros_like(step)
                    if HAS_C:
                        ungated = dys[k * GROUP + i].to(dtype)
                        if HAS_Z:
                            z_ = zs[k * GROUP + i].to(dtype)
                            open_ = _sigmoid(z_)
                            out = _sum_over_low(_dot(h_after, C_, 0, PER), LOW) + skip[k] * x_
                            dz_ = ungated * out * (open_ * (1 + z_ * (1 - open_)))
                            tl.store(dz + to, dz_.to(dz.dtype.element_ty), mask=write)
                            ungated = ungated * (z_ * open_)
                        if HAS_D:
                            d_D = ungated * x_
                            dx_ = ungated * skip[k]
                        new_dC = ()
                        for j in tl.static_range(PER):
                            g_after = g_after + (g[k * PER + j] + ungated * C_[j],)
                            new_dC = new_dC + (dC_[j] + h_after[j] * ungated,)
                        dC_ = new_dC
                    else:
                        for j in tl.static_range(PER):
                            g_after = g_after + (g[k * PER + j],)
                    new_dB = ()
                    for j in tl.static_range(PER):
                        new_dB = new_dB + (dB_[j] + g_after[j] * moved,)
                        d_exponent = d_exponent + (g_after[j] * lasting[(i * INNER + k) * PER + j],)
                        new_sum_A = new_sum_A + (sum_A[k * PER + j] + d_exponent[j] * step,)
                        g_before = g_before + (decays[(i * INNER + k) * PER + j] * g_after[j],)
                    dB_ = new_dB
                    d_moved = _sum_over_low(_dot(g_after, B_, 0, PER), LOW)
                    dx_ += d_moved * step
                    tl.store(dx + to, dx_.to(dx.dtype.element_ty), mask=write)
                    own = ()
                    for j in tl.static_range(PER):
                        own = own + (rates[k * PER + j],)
                    d_step = d_moved * x_ + _sum_over_low(_dot(d_exponent, own, 0, PER), LOW) * LN2
                    if SOFTPLUS:
                        raw = raws[k * GROUP + i].to(dtype)
                        if HAS_BIAS:
                            raw += bias[k]
                        d_step = d_step * _sigmoid(raw)
                    if not EVEN:
                        d_step = tl.where(exists, d_step, 0.0)
                    tl.store(ddt + to, d_step.to(ddt.dtype.element_ty), mask=write)
                    new_sum_bias = new_sum_bias + (sum_bias[k] + d_step,)
                    new_sum_D = new_sum_D + (sum_D[k] + d_D,)
                g, sum_A, sum_D, sum_bias = g_before, new_sum_A, new_sum_D, new_sum_bias
                if HAS_RESET:
                    g = _clear(resets[i] != 0, g)
                at = (shared + token) * STATE + i * STATE
                _store_rows(dB + at, dC + at, low, place, dB_, dC_, i < left, HAS_C, STATE, PER, LOW)
    for k in tl.static_range(INNER):
        channel = block * (INNER * OUTER) + k * OUTER + place
        here = channel < channels
        channel = channel.to(tl.int64)
        lone = here & (low == 0)
        _store_states(dA + (part * channels + channel) * STATE, 1, low, here, sum_A, k * PER, STATE, PER)
        if HAS_D:
            tl.store(dD + part * channels + channel, sum_D[k], mask=lone)
        if HAS_BIAS:
            tl.store(ddt_bias + part * channels + channel, sum_bias[k], mask=lone)
        if segment == 0:
            _store_states(early + (row * channels + channel) * STATE, 1, low, here, g, k * PER, STATE, PER)
