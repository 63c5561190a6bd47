"""The selective scan for NVIDIA GPUs: the Triton kernels. `triton_plan` launches them; see there for how they combine.

One program takes a block of channels of one row of the batch through one segment of its time, token by token, with the
state in registers. (The formulas of the backward pass are in `xla`.) Tokens are unrolled: Triton cannot index a tile of
registers by a loop variable, so the states of a chunk, which the backward pass recomputes from the chunk's border, are
a tuple of tiles. What programs share (the gradients of A, B, C, D and dt_bias) each writes for itself, to be summed
outside in a fixed order: no atomics.

Every tile has the five axes [HIGH, INNER, WARPS, LOW, OUTER], some of them of size 1. A state's number is high * LOW +
low, a channel's place in the block (warp * INNER + inner) * OUTER + outer. Triton spreads the lanes of a warp over the
last axes and the warps over the next one, and LOW * OUTER is 32; so a thread holds HIGH x INNER numbers, tiles that
differ only in axes of size 1 are laid out alike, no tile is ever moved through shared memory, and a sum over the state
or over channels goes mostly within a thread. Loads are told that nothing is contiguous, since Triton would otherwise
choose other layouts for them and convert. Arithmetic is in the dtype of the states, whatever the arrays' own.

Offsets are int64 from the token's number on: batch x time x channels may exceed 2^31.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _channels(block, channels, unit, INNER: tl.constexpr, WARPS: tl.constexpr, LOW: tl.constexpr, OUTER: tl.constexpr):
    """The channels of a block, int64 [1, INNER, WARPS, LOW, OUTER], and which of them exist."""
    inner = tl.arange(0, INNER)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    outer = tl.arange(0, OUTER)[None, None, None, None, :]
    start = block * (INNER * WARPS * OUTER) + warp * (INNER * OUTER)
    number = (start + outer * unit).to(tl.int64) + (inner * OUTER).to(tl.int64)
    exists = start + inner * OUTER + outer < channels
    shape: tl.constexpr = [1, INNER, WARPS, LOW, OUTER]
    return tl.broadcast_to(number, shape), tl.broadcast_to(exists, shape)


@triton.jit
def _states(unit, STATE: tl.constexpr, HIGH: tl.constexpr, WARPS: tl.constexpr, LOW: tl.constexpr, OUTER: tl.constexpr):
    """The numbers of a state, int64 [HIGH, 1, WARPS, LOW, OUTER], and which of them exist."""
    high = tl.arange(0, HIGH)[:, None, None, None, None]
    low = tl.arange(0, LOW)[None, None, None, :, None]
    number, exists = (high * LOW).to(tl.int64) + (low * unit).to(tl.int64), high * LOW + low < STATE
    shape: tl.constexpr = [HIGH, 1, WARPS, LOW, OUTER]
    return tl.broadcast_to(number, shape), tl.broadcast_to(exists, shape)


@triton.jit
def _is_first_lane(LOW: tl.constexpr):
    """Of the lanes that hold the same channel, one: the mask for what is per channel."""
    return tl.arange(0, LOW)[None, None, None, :, None] == 0


@triton.jit
def _is_first_channel(WARPS: tl.constexpr, OUTER: tl.constexpr):
    """Of the lanes that hold the same part of the state, one: the mask for what is per state."""
    first_warp = tl.arange(0, WARPS)[None, None, :, None, None] == 0
    return first_warp & (tl.arange(0, OUTER)[None, None, None, None, :] == 0)


@triton.jit
def _program(channels, segments, BLOCK: tl.constexpr):
    """(block, segment, row) of this program; blocks that share B and C are neighbours."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK)
    return program % blocks, (program // blocks) % segments, program // blocks // segments


@triton.jit
def _sum_over_state(tile):
    return tl.sum(tl.sum(tile, axis=0, keep_dims=True), axis=3, keep_dims=True)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums_over_channels(one, other):
    """Both at once, so that warps meet once."""
    one = tl.sum(tl.sum(one, axis=1, keep_dims=True), axis=4, keep_dims=True)
    other = tl.sum(tl.sum(other, axis=1, keep_dims=True), axis=4, keep_dims=True)
    return tl.reduce((one, other), 2, _add_pairs, keep_dims=True)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to the last digits also where it is tiny: log1p(e) = 2 atanh(e / (2 + e)), as a series."""
    e = tl.exp(-tl.abs(x))
    ratio = e / (2 + e)
    square = ratio * ratio
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    series = tl.zeros_like(x) + 1.0 / (2 * TERMS - 1)
    for i in tl.static_range(1, TERMS):
        series = series * square + 1.0 / (2 * (TERMS - i) - 1)
    return tl.maximum(x, 0.0) + 2 * ratio * series


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _load(array, offsets, mask, dtype: tl.constexpr):
    return tl.load(array + offsets, mask=mask, other=0.0).to(dtype)


@triton.jit
def _step(raw, bias, mask, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(the step size of a token, what went into the softplus). Where masked, the step is 0: nothing happens."""
    if HAS_BIAS:
        raw = raw + bias
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    return tl.where(mask, step, 0.0), raw


@triton.jit
def _load_reset(reset, token, exists, HAS_RESET: tl.constexpr):
    if HAS_RESET:
        return tl.load(reset + token, mask=exists, other=0) != 0
    else:
        return exists & False


@triton.jit
def _load_parameter(array, channel, here, HAS: tl.constexpr, dtype: tl.constexpr):
    """What there is one of per channel, or 0."""
    if HAS:
        return _load(array, channel, here, dtype)
    else:
        return tl.zeros_like(channel).to(dtype)


@triton.jit
def _get(tiles, index):
    """The tile of a tuple by a number that is not known when this is compiled."""
    tile = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        tile = tl.where(index == i, tiles[i], tile)
    return tile


@triton.jit
def _put(tiles, index, tile):
    """The tuple with ``tile`` at ``index``."""
    changed = ()
    for i in tl.static_range(len(tiles)):
        changed = changed + (tl.where(index == i, tile, tiles[i]),)
    return changed


@triton.jit
def forward(
    x, dt, A, B, C, D, z, dt_bias, reset, initial,
    time, channels, segments, length,
    y, borders, final, dt_sum, kept,
    SUMMARY: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HIGH: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, LOW: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """The scan of a segment.

    x, dt, z, y [batch, time, channels]; A [channels, STATE]; B, C [batch, time, STATE]; D, dt_bias [channels]; reset
    int8 [batch, time]; initial [batch, segments, channels, STATE]; final [batch, channels, STATE]. What is absent by
    the HAS_ flags is not touched. Tokens are read and unrolled GROUP at a time.
    KEEP: writes the state before each chunk, borders [batch, chunks, STATE, channels].
    SUMMARY: starts from zero, without y; writes final [batch, segments, channels, STATE], dt_sum and kept (0 where a
    reset lies in the segment, else 1) [batch, segments, channels].
    """
    block, segment, row = _program(channels, segments, INNER * WARPS * OUTER)
    dtype: tl.constexpr = final.dtype.element_ty
    unit = tl.minimum(length, 1)
    channel, here = _channels(block, channels, unit, INNER, WARPS, LOW, OUTER)
    state, held = _states(unit, STATE, HIGH, WARPS, LOW, OUTER)
    lone = here & _is_first_lane(LOW)
    row, part = row.to(tl.int64), row.to(tl.int64) * segments + segment
    place = channel * STATE + state
    rate = _load(A, place, here & held, dtype) / LN2
    skip = _load_parameter(D, channel, here, HAS_D, dtype)
    bias = _load_parameter(dt_bias, channel, here, HAS_BIAS, dtype)
    elapsed = tl.zeros_like(bias)
    broken = segment < 0  # whether a reset was met: not yet
    h = tl.zeros_like(rate)
    if not SUMMARY:
        h = _load(initial, part * channels * STATE + place, here & held, dtype)
    first = segment * length
    last = tl.minimum(first + length, time)
    for start in range(first, last, GROUP):
        if KEEP:
            if start % CHUNK == 0:
                border = (row * tl.cdiv(time, CHUNK) + start // CHUNK) * STATE + state
                tl.store(borders + border * channels + channel, h, mask=here & held)
        # All loads of the group come first: a load that is written after a store waits for it.
        raws, xs, Bs, Cs, zs, resets = (), (), (), (), (), ()
        for i in tl.static_range(GROUP):
            exists, token = start + i < last, row * time + start + i
            raws = raws + (_load(dt, token * channels + channel, here & exists, dtype),)
            xs = xs + (_load(x, token * channels + channel, here & exists, dtype),)
            Bs = Bs + (_load(B, token * STATE + state, held & exists, dtype),)
            if HAS_C:
                Cs = Cs + (_load(C, token * STATE + state, held & exists, dtype),)
            if HAS_Z:
                zs = zs + (_load(z, token * channels + channel, here & exists, dtype),)
            resets = resets + (_load_reset(reset, token, exists, HAS_RESET),)
        for i in tl.static_range(GROUP):
            exists, token = start + i < last, row * time + start + i
            if HAS_RESET:
                h = tl.where(resets[i], 0.0, h)
                broken = broken | resets[i]
            step, _ = _step(raws[i], bias, here & exists, SOFTPLUS, HAS_BIAS)
            h = tl.exp2(step * rate) * h + (step * xs[i]) * Bs[i]
            elapsed += step
            if HAS_C:
                out = _sum_over_state(h * Cs[i]) + skip * xs[i]
                if HAS_Z:
                    out = out * (zs[i] * _sigmoid(zs[i]))
                tl.store(y + token * channels + channel, out.to(y.dtype.element_ty), mask=lone & exists)
    if SUMMARY:
        tl.store(final + part * channels * STATE + place, h, mask=here & held)
        tl.store(dt_sum + part * channels + channel, elapsed, mask=lone)
        tl.store(kept + part * channels + channel, tl.where(broken, 0.0, tl.zeros_like(elapsed) + 1), mask=lone)
    else:
        if segment == segments - 1:
            tl.store(final + row * channels * STATE + place, h, mask=here & held)


@triton.jit
def adjoint(
    dt, A, C, z, dt_bias, reset, dy,
    time, channels, segments, length,
    early, dt_sum, kept,
    GROUP: tl.constexpr, STATE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_C: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    HIGH: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, LOW: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, if that of the state after it is 0.

    Writes early [batch, segments, channels, STATE], and dt_sum and kept as `forward` does. Without C there is no dy.
    """
    block, segment, row = _program(channels, segments, INNER * WARPS * OUTER)
    dtype: tl.constexpr = early.dtype.element_ty
    unit = tl.minimum(length, 1)
    channel, here = _channels(block, channels, unit, INNER, WARPS, LOW, OUTER)
    state, held = _states(unit, STATE, HIGH, WARPS, LOW, OUTER)
    lone = here & _is_first_lane(LOW)
    row, part = row.to(tl.int64), row.to(tl.int64) * segments + segment
    place = channel * STATE + state
    rate = _load(A, place, here & held, dtype) / LN2
    bias = _load_parameter(dt_bias, channel, here, HAS_BIAS, dtype)
    elapsed = tl.zeros_like(bias)
    broken = segment < 0
    g = tl.zeros_like(rate)
    first = segment * length
    groups = tl.cdiv(tl.minimum(length, time - first), GROUP)
    for group in range(groups):
        start = first + (groups - 1 - group) * GROUP
        raws, Cs, dys, zs, resets = (), (), (), (), ()
        for i in tl.static_range(GROUP):
            exists, token = start + i < time, row * time + start + i
            raws = raws + (_load(dt, token * channels + channel, here & exists, dtype),)
            if HAS_C:
                Cs = Cs + (_load(C, token * STATE + state, held & exists, dtype),)
                dys = dys + (_load(dy, token * channels + channel, here & exists, dtype),)
            if HAS_Z:
                zs = zs + (_load(z, token * channels + channel, here & exists, dtype),)
            resets = resets + (_load_reset(reset, token, exists, HAS_RESET),)
        for i in tl.static_range(GROUP - 1, -1, -1):
            step, _ = _step(raws[i], bias, here & (start + i < time), SOFTPLUS, HAS_BIAS)
            if HAS_C:
                ungated = dys[i]
                if HAS_Z:
                    ungated = ungated * (zs[i] * _sigmoid(zs[i]))
                g += ungated * Cs[i]
            g = tl.exp2(step * rate) * g
            elapsed += step
            if HAS_RESET:
                g = tl.where(resets[i], 0.0, g)
                broken = broken | resets[i]
    tl.store(early + part * channels * STATE + place, g, mask=here & held)
    tl.store(dt_sum + part * channels + channel, elapsed, mask=lone)
    tl.store(kept + part * channels + channel, tl.where(broken, 0.0, tl.zeros_like(elapsed) + 1), mask=lone)


@triton.jit
def combine(
    A, edge, ends, dt_sum, kept,
    channels, segments,
    starts, out,
    BACK: tl.constexpr, STATE: tl.constexpr,
    HIGH: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, LOW: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """The state at which each segment starts, from the summaries of the segments; BACK: from the last to the first.

    edge, out [batch, channels, STATE]: the state before the first segment and after the last. ends, starts [batch,
    segments, channels, STATE]: where a segment gets from zero, and what it starts from. dt_sum, kept as of `forward`.
    """
    block, _, row = _program(channels, 1, INNER * WARPS * OUTER)
    dtype: tl.constexpr = ends.dtype.element_ty
    unit = tl.minimum(channels, 1)
    channel, here = _channels(block, channels, unit, INNER, WARPS, LOW, OUTER)
    state, held = _states(unit, STATE, HIGH, WARPS, LOW, OUTER)
    row = row.to(tl.int64)
    place = channel * STATE + state
    rate = _load(A, place, here & held, dtype) / LN2
    h = _load(edge, row * channels * STATE + place, here & held, dtype)
    for i in range(segments):
        part = row * segments + i
        if BACK:
            part = row * segments + segments - 1 - i
        end = _load(ends, part * channels * STATE + place, here & held, dtype)
        elapsed = _load(dt_sum, part * channels + channel, here, dtype)
        keeps = _load(kept, part * channels + channel, here, dtype) != 0
        tl.store(starts + part * channels * STATE + place, h, mask=here & held)
        h = tl.where(keeps, tl.exp2(elapsed * rate) * h, 0.0) + end
    tl.store(out + row * channels * STATE + place, h, mask=here & held)


@triton.jit
def backward(
    x, dt, A, B, C, D, z, dt_bias, reset, borders, dy, late,
    time, channels, segments, length,
    dx, ddt, dz, dB, dC, dA, dD, ddt_bias, early,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, STATE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_C: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    HIGH: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, LOW: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """The gradients of a segment, chunk by chunk from its end.

    late [batch, segments, channels, STATE], early [batch, channels, STATE]: gradients of the state after each segment
    and before the first. Written for each block: dB, dC [blocks, batch, time, STATE]; for each segment: dA [batch,
    segments, channels, STATE], dD, ddt_bias [batch, segments, channels]. All else as in `forward`.
    """
    block, segment, row = _program(channels, segments, INNER * WARPS * OUTER)
    dtype: tl.constexpr = late.dtype.element_ty
    unit = tl.minimum(length, 1)
    channel, here = _channels(block, channels, unit, INNER, WARPS, LOW, OUTER)
    state, held = _states(unit, STATE, HIGH, WARPS, LOW, OUTER)
    lone, alone = here & _is_first_lane(LOW), held & _is_first_channel(WARPS, OUTER)
    batch = tl.num_programs(0) // tl.cdiv(channels, INNER * WARPS * OUTER) // segments
    row, part = row.to(tl.int64), row.to(tl.int64) * segments + segment
    shared = (block.to(tl.int64) * batch + row) * time  # of dB and dC
    place = channel * STATE + state
    rate = _load(A, place, here & held, dtype) / LN2
    skip = _load_parameter(D, channel, here, HAS_D, dtype)
    bias = _load_parameter(dt_bias, channel, here, HAS_BIAS, dtype)
    g = _load(late, part * channels * STATE + place, here & held, dtype)
    sum_A, sum_D, sum_bias = tl.zeros_like(rate), tl.zeros_like(bias), tl.zeros_like(bias)
    first = segment * length
    chunks = tl.cdiv(tl.minimum(length, time - first), CHUNK)
    for chunk in range(chunks):
        start = first + (chunks - 1 - chunk) * CHUNK
        border = (row * tl.cdiv(time, CHUNK) + start // CHUNK) * STATE + state
        h = _load(borders, border * channels + channel, here & held, dtype)
        found = (h,) * (CHUNK // GROUP)  # the states before each group of tokens
        for group in range(CHUNK // GROUP - 1):
            for i in tl.static_range(GROUP):
                at = start + group * GROUP + i
                exists, token = at < time, row * time + at
                raw = _load(dt, token * channels + channel, here & exists, dtype)
                x_ = _load(x, token * channels + channel, here & exists, dtype)
                B_ = _load(B, token * STATE + state, held & exists, dtype)
                step, _ = _step(raw, bias, here & exists, SOFTPLUS, HAS_BIAS)
                if HAS_RESET:
                    h = tl.where(_load_reset(reset, token, exists, HAS_RESET), 0.0, h)
                h = tl.exp2(step * rate) * h + (step * x_) * B_
            found = _put(found, group + 1, h)
        for back in range(CHUNK // GROUP):
            group = CHUNK // GROUP - 1 - back
            h = _get(found, group)
            xs, raws, steps, Bs, resets, hs = (), (), (), (), (), ()
            for i in tl.static_range(GROUP):
                at = start + group * GROUP + i
                exists, token = at < time, row * time + at
                xs = xs + (_load(x, token * channels + channel, here & exists, dtype),)
                raws = raws + (_load(dt, token * channels + channel, here & exists, dtype),)
                Bs = Bs + (_load(B, token * STATE + state, held & exists, dtype),)
                resets = resets + (_load_reset(reset, token, exists, HAS_RESET),)
            for i in tl.static_range(GROUP):
                exists = start + group * GROUP + i < time
                if HAS_RESET:
                    h = tl.where(resets[i], 0.0, h)
                hs = hs + (h,)
                step, raw = _step(raws[i], bias, here & exists, SOFTPLUS, HAS_BIAS)
                steps = steps + (step,)
                if i < GROUP - 1:
                    h = tl.exp2(step * rate) * h + (step * xs[i]) * Bs[i]
            for i in tl.static_range(GROUP - 1, -1, -1):
                at = start + group * GROUP + i
                exists, token = at < time, row * time + at
                x_, step, B_ = xs[i], steps[i], Bs[i]
                decay = tl.exp2(step * rate)
                lasting, moved = decay * hs[i], step * x_
                dx_ = tl.zeros_like(x_)
                if HAS_C:
                    C_ = _load(C, token * STATE + state, held & exists, dtype)
                    ungated = _load(dy, token * channels + channel, here & exists, dtype)
                    h = lasting + moved * B_
                    if HAS_Z:
                        z_ = _load(z, token * channels + channel, here & exists, dtype)
                        open_ = _sigmoid(z_)
                        dz_ = ungated * (_sum_over_state(h * C_) + skip * x_) * (open_ * (1 + z_ * (1 - open_)))
                        tl.store(dz + token * channels + channel, dz_.to(dz.dtype.element_ty), mask=lone & exists)
                        ungated = ungated * (z_ * open_)
                    if HAS_D:
                        sum_D += ungated * x_
                        dx_ = ungated * skip
                    g += ungated * C_
                    dB_, dC_ = _sums_over_channels(g * moved, h * ungated)
                    tl.store(dC + (shared + at) * STATE + state, dC_, mask=alone & exists)
                else:
                    dB_, _ = _sums_over_channels(g * moved, g * moved)
                tl.store(dB + (shared + at) * STATE + state, dB_, mask=alone & exists)
                d_moved = _sum_over_state(g * B_)
                dx_ = dx_ + d_moved * step
                tl.store(dx + token * channels + channel, dx_.to(dx.dtype.element_ty), mask=lone & exists)
                d_exponent = g * lasting
                d_step = d_moved * x_ + _sum_over_state(d_exponent * rate) * LN2
                sum_A += d_exponent * step
                if SOFTPLUS:
                    raw = raws[i]
                    if HAS_BIAS:
                        raw = raw + bias
                    d_step = d_step * _sigmoid(raw)
                sum_bias += tl.where(here & exists, d_step, 0.0)
                tl.store(ddt + token * channels + channel, d_step.to(ddt.dtype.element_ty), mask=lone & exists)
                g = decay * g
                if HAS_RESET:
                    g = tl.where(resets[i], 0.0, g)
    tl.store(dA + part * channels * STATE + place, sum_A, mask=here & held)
    if HAS_D:
        tl.store(dD + part * channels + channel, sum_D, mask=lone)
    if HAS_BIAS:
        tl.store(ddt_bias + part * channels + channel, sum_bias, mask=lone)
    if segment == 0:
        tl.store(early + row * channels * STATE + place, g, mask=here & held)
