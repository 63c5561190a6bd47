"""The depthwise causal convolution for NVIDIA GPUs: the Triton kernels. `triton_gpu` launches them.

One program takes a block of channels of one row of the batch through a segment of its tokens, with the last WIDTH
tokens in registers, so that every token is read once (but for WIDTH - 1 at a segment's edge). GROUP tokens are read at
a time. Arithmetic is in the dtype of the weights. Offsets are int64 from the token's number on: batch x time x channels
may exceed 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def _program(CHANNELS: tl.constexpr, BLOCK: tl.constexpr, segments):
    """(channels of this program, which of them exist, segment, row)."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return channel, channel < CHANNELS, (program // blocks) % segments, (program // blocks // segments).to(tl.int64)


@triton.jit
def _weights(weight, channel, here, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """The taps by how far back they look; weight [WIDTH, CHANNELS]."""
    found = ()
    for distance in tl.static_range(WIDTH):
        found = found + (tl.load(weight + (WIDTH - 1 - distance) * CHANNELS + channel, mask=here, other=0.0),)
    return found


@triton.jit
def _read(x, tail, row, token, time, channel, here, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """A token of x, or of the tail where it is before the first; 0 after the last."""
    value = tl.load(x + (row * time + token) * CHANNELS + channel, mask=here & (token >= 0) & (token < time), other=0.0)
    value = value.to(dtype)
    if WIDTH > 1:
        held = (row * (WIDTH - 1) + WIDTH - 1 + token) * CHANNELS
        before = tl.load(tail + held + channel, mask=here & (token < 0), other=0.0).to(dtype)
        value = tl.where(token < 0, before, value)
    return value


@triton.jit
def _load_limit(lookback, row, token, time, LIMITED: tl.constexpr, WIDTH: tl.constexpr):
    """How far back a token looks; anything for a token that there is not."""
    if LIMITED:
        return tl.load(lookback + row * time + token, mask=(token >= 0) & (token < time), other=0)
    else:
        return tl.minimum(token, 0).to(tl.int32) * 0 + WIDTH


@triton.jit
def _seen(tile, distance: tl.constexpr, limit):
    """By selection, so that not even a NaN passes."""
    if distance == 0:
        return tile
    else:
        return tl.where(limit >= distance, tile, 0.0)


@triton.jit
def forward(
    x, tail, weight, bias, lookback,
    time, segments,
    y,
    SILU: tl.constexpr, LIMITED: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    LENGTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x, y [batch, time, CHANNELS]; tail [batch, WIDTH - 1, CHANNELS]; weight [WIDTH, CHANNELS]; bias [CHANNELS];
    lookback int32 [batch, time], if LIMITED."""
    channel, here, segment, row = _program(CHANNELS, BLOCK, segments)
    dtype: tl.constexpr = weight.dtype.element_ty
    weights = _weights(weight, channel, here, CHANNELS, WIDTH)
    offset = tl.load(bias + channel, mask=here, other=0.0)
    first = segment.to(tl.int64) * LENGTH
    held = ()  # the WIDTH - 1 tokens before, the latest last
    for i in tl.static_range(WIDTH - 1):
        held = held + (_read(x, tail, row, first - (WIDTH - 1) + i, time, channel, here, CHANNELS, WIDTH, dtype),)
    for group in range(LENGTH // GROUP):
        start = first + group * GROUP
        window, limits = held, ()
        for i in tl.static_range(GROUP):
            token = (row * time + start + i) * CHANNELS
            window = window + (tl.load(x + token + channel, mask=here & (start + i < time), other=0.0).to(dtype),)
            limits = limits + (_load_limit(lookback, row, start + i, time, LIMITED, WIDTH),)
        for i in tl.static_range(GROUP):
            total = offset
            for distance in tl.static_range(WIDTH):
                total += weights[distance] * _seen(window[i + WIDTH - 1 - distance], distance, limits[i])
            if SILU:
                total = total / (1 + tl.exp(-total))
            token = (row * time + start + i) * CHANNELS
            tl.store(y + token + channel, total.to(y.dtype.element_ty), mask=here & (start + i < time))
        held = ()
        for i in tl.static_range(WIDTH - 1):
            held = held + (window[GROUP + i],)


@triton.jit
def backward(
    x, tail, weight, bias, lookback, dy,
    time, segments,
    dx, dtail, sums,
    SILU: tl.constexpr, LIMITED: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    LENGTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tokens are gone through from the last that sees one of the segment to the first of it.

    What each gives to the gradients of those that it sees is added up in registers until nobody is left who sees them.
    sums [batch, segments, WIDTH + 1, CHANNELS]: the segment's shares of dweight by column, and of dbias. The program of
    the first segment also writes dtail [batch, WIDTH - 1, CHANNELS]. All else as in `forward`.
    """
    channel, here, segment, row = _program(CHANNELS, BLOCK, segments)
    dtype: tl.constexpr = weight.dtype.element_ty
    weights = _weights(weight, channel, here, CHANNELS, WIDTH)
    offset = tl.load(bias + channel, mask=here, other=0.0)
    first = segment.to(tl.int64) * LENGTH
    last = tl.minimum(first + LENGTH, time)
    groups: tl.constexpr = (LENGTH + WIDTH - 1 + GROUP - 1) // GROUP
    beyond = first + groups * GROUP
    zero = tl.zeros_like(offset)
    held, due, shares = (), (), (zero,)
    # held: the WIDTH - 1 tokens before `beyond`, the latest last; due: what their gradients have got so far.
    for i in tl.static_range(WIDTH - 1):
        held = held + (_read(x, tail, row, beyond - (WIDTH - 1) + i, time, channel, here, CHANNELS, WIDTH, dtype),)
        due, shares = due + (zero,), shares + (zero,)
    shares = shares + (zero,)
    for group in range(groups):
        start = beyond - (group + 1) * GROUP
        window, limits, dys = (), (), ()
        for i in tl.static_range(GROUP):
            early = start + i - (WIDTH - 1)
            window = window + (_read(x, tail, row, early, time, channel, here, CHANNELS, WIDTH, dtype),)
            limits = limits + (_load_limit(lookback, row, start + i, time, LIMITED, WIDTH),)
            read = here & (start + i < tl.minimum(last + WIDTH - 1, time))
            dys = dys + (tl.load(dy + (row * time + start + i) * CHANNELS + channel, mask=read, other=0.0).to(dtype),)
        window = window + held
        for i in tl.static_range(GROUP - 1, -1, -1):
            own = start + i < last
            g = dys[i]
            if SILU:
                total = offset
                for distance in tl.static_range(WIDTH):
                    total += weights[distance] * _seen(window[i + WIDTH - 1 - distance], distance, limits[i])
                gate = 1 / (1 + tl.exp(-total))
                g = g * (gate * (1 + total * (1 - gate)))
            # due has WIDTH - 1 tokens that end with this one; from here on, those that end with the one before.
            added, grown = (), ()
            for distance in tl.static_range(WIDTH - 1, -1, -1):
                got = _seen(weights[distance] * g, distance, limits[i])
                if distance < WIDTH - 1:
                    got += due[WIDTH - 2 - distance]
                added = added + (got,)
                share = g * _seen(window[i + WIDTH - 1 - distance], distance, limits[i])
                grown = grown + (shares[WIDTH - 1 - distance] + tl.where(own, share, 0.0),)
            shares = grown + (shares[WIDTH] + tl.where(own, g, 0.0),)
            token = (row * time + start + i) * CHANNELS
            tl.store(dx + token + channel, added[WIDTH - 1].to(dx.dtype.element_ty), mask=here & own)
            due = ()
            for tap in tl.static_range(WIDTH - 1):
                due = due + (added[tap],)
        held = ()
        for i in tl.static_range(WIDTH - 1):
            held = held + (window[i],)
    for tap in tl.static_range(WIDTH + 1):
        place = ((row * segments + segment) * (WIDTH + 1) + tap) * CHANNELS
        tl.store(sums + place + channel, shares[tap], mask=here)
    for i in tl.static_range(WIDTH - 1):
        place = (row * (WIDTH - 1) + i) * CHANNELS
        tl.store(dtail + place + channel, due[i], mask=here & (segment == 0))
