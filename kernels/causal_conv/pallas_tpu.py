"""The backward pass of the convolution as one Pallas kernel for TPU; forward, XLA's loop moves nothing twice.

With g the gradient of the sums before silu (which are computed again), the kernel reads x and dy once and writes dx:

    dx[t]         = sum over j of weight[:, width - 1 - j] g[t + j]        where token t + j sees so far back
    dweight[:, j] = sum over t of g[t] x[t - (width - 1) + j]

The grid is (batch, blocks of channels, chunks of time), the last from the end: the first g of a chunk are kept for the
chunk before it, whose tokens they saw. The tokens before a chunk are a small block of their own. Channels lie on lanes
and tokens on sublanes; a shift in time is a rotation of what was widened, of a tile and eight tokens more. How far a
token looks back comes as a row and is turned once a chunk into a column of full lanes.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx_kernels.backends import is_interpreted
from lcx_kernels.causal_conv import xla
from lcx_kernels.causal_conv.taps import add_last, last_tokens, taps
from lcx_kernels.varying import varying_axes, varying_struct

_LANES = 128
_EDGE = 16  # rows kept around a chunk: one packed register
_MORE = 8  # rows that a filter reaches beyond a tile, at most: one register


@dataclass(frozen=True)
class _Plan:
    """What is known of a call before it is traced."""

    silu: bool
    batch: int
    time: int
    channels: int
    width: int
    rows: int  # tokens of a tile
    chunk: int  # tokens of a grid step
    block: int  # channels of a grid step
    limited: bool  # whether there is a lookback
    dtype: np.dtype
    interpret: bool

    @property
    def chunks(self) -> int:
        return -(-self.time // self.chunk)


def _plan(silu, x, weight, lookback) -> _Plan:
    batch, time, channels = x.shape
    interpret = is_interpreted()
    chunk = _EDGE if interpret else min(256, -(-time // _LANES) * _LANES)  # small, so that short tests cross chunks
    block = channels if channels <= 4 * _LANES else 4 * _LANES
    rows = min(32, chunk)
    dtype = np.dtype(weight.dtype)
    return _Plan(
        silu, batch, time, channels, weight.shape[1], rows, chunk, block, lookback is not None, dtype, interpret
    )


def convolve(silu, x, tail, weight, bias, lookback) -> tuple[jax.Array, jax.Array]:
    """The convolution; see `reference.convolve`."""
    return _convolve(_plan(silu, x, weight, lookback), x, tail, weight, bias, lookback)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: _Plan, x, tail, weight, bias, lookback):
    return xla.forward(plan.silu, x, tail, weight, bias, lookback), last_tokens(x, tail)


def _forward(plan, x, tail, weight, bias, lookback):
    return _convolve(plan, x, tail, weight, bias, lookback), (x, tail, weight, bias, lookback)


def _backward(plan, residuals, cotangents):
    x, tail, weight, bias, lookback = residuals
    dy, d_last = cotangents
    found = _call(plan, *residuals, dy)
    d_tail = found["dtail"][:, _EDGE - tail.shape[1] :].astype(tail.dtype)
    dx, d_tail = add_last(found["dx"], d_tail, d_last)
    sums = found["sums"].sum(axis=0)
    return dx, d_tail, sums[: plan.width].T, sums[plan.width].astype(bias.dtype), None


_convolve.defvjp(_forward, _backward)


def _call(plan: _Plan, x, tail, weight, bias, lookback, dy) -> dict[str, jax.Array]:
    """Returns dx; dtail [batch, edge, channels], its last rows; sums [batch, width + 1, channels]: dweight, dbias."""
    last = plan.chunks - 1
    edges = plan.chunk // _EDGE  # in a chunk
    chunk, block = plan.chunk, plan.block
    tokens = pl.BlockSpec((None, chunk, block), lambda b, c, t: (b, last - t, c))
    before = pl.BlockSpec((None, _EDGE, block), lambda b, c, t: (b, jnp.maximum((last - t) * edges - 1, 0), c))
    ends = pl.BlockSpec((None, _EDGE, block), lambda b, c, t: (b, 0, c))
    sums = pl.BlockSpec((None, plan.width + 1, block), lambda b, c, t: (b, 0, c))
    inputs = {
        "x": (x, tokens),
        "before": (_at_least(x, _EDGE), before),
        "tail": (jnp.pad(tail, ((0, 0), (_EDGE - tail.shape[1], 0), (0, 0))), ends),
        "dy": (dy, tokens),
        "weight": (weight.T, pl.BlockSpec((plan.width, block), lambda b, c, t: (0, c))),
        "bias": (bias[None], pl.BlockSpec((1, block), lambda b, c, t: (0, c))),
    }
    if plan.limited:
        limits = jnp.pad(lookback.astype(jnp.int32)[:, None], ((0, 0), (0, 0), (0, plan.chunks * chunk - plan.time)))
        inputs["limits"] = (limits, pl.BlockSpec((None, 1, chunk), lambda b, c, t: (b, 0, last - t)))
    arrays = {name: array for name, (array, _) in inputs.items()}
    axes = varying_axes(arrays)
    row = functools.partial(varying_struct, axes=axes)
    outputs = {
        "dx": (row(x.shape, x.dtype), tokens),
        "dtail": (row((plan.batch, _EDGE, plan.channels), plan.dtype), ends),
        "sums": (row((plan.batch, plan.width + 1, plan.channels), plan.dtype), sums),
    }
    scratch = [pltpu.VMEM((_EDGE + chunk, block), plan.dtype), pltpu.VMEM((chunk + 2 * _EDGE, block), plan.dtype)]
    if plan.limited:
        scratch.append(pltpu.VMEM((chunk + 2 * _EDGE, _lanes(plan)), jnp.int32))
    call = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(plan.batch, -(-plan.channels // block), plan.chunks),
        in_specs=[{name: spec for name, (_, spec) in inputs.items()}],
        out_specs={name: spec for name, (_, spec) in outputs.items()},
        out_shape={name: struct for name, (struct, _) in outputs.items()},
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=plan.interpret,
        name="causal_conv_backward",
    )
    return call(arrays)


def _at_least(x: jax.Array, time: int) -> jax.Array:
    """A block must not be larger than its array."""
    return jnp.pad(x, ((0, 0), (0, time - x.shape[1]), (0, 0))) if x.shape[1] < time else x


def _lanes(plan: _Plan) -> int:
    return min(plan.block, _LANES)


def _kernel(plan: _Plan, refs: dict, out: dict, x_ref, g_ref, limit_ref=None):
    """Scratch: x of the chunk and the edge before it; g and lookback of the chunk and an edge on either side."""
    step = pl.program_id(2)
    chunk = plan.chunks - 1 - step
    after = pl.ds(_EDGE + plan.chunk, _EDGE)

    @pl.when(step == 0)
    def _():
        for ref in (g_ref, limit_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)
        out["sums"][...] = jnp.zeros_like(out["sums"])

    @pl.when(step > 0)
    def _():  # what was the head of a chunk comes after this one
        for ref in (g_ref, limit_ref):
            if ref is not None:
                ref[after] = ref[pl.ds(_EDGE, _EDGE)]

    tail, before = (refs[name][...].astype(plan.dtype) for name in ("tail", "before"))
    x_ref[pl.ds(0, _EDGE)] = jax.lax.select(chunk == 0, tail, before)
    x_ref[pl.ds(_EDGE, plan.chunk)] = refs["x"][...].astype(plan.dtype)
    if plan.limited:
        row = jnp.broadcast_to(refs["limits"][...], (_lanes(plan), plan.chunk))
        limit_ref[pl.ds(_EDGE, plan.chunk)] = row.T

    tiles = plan.chunk // plan.rows
    groups = [slice(start, min(start + _LANES, plan.block)) for start in range(0, plan.block, _LANES)]

    def tile(i, carry):
        first = pl.multiple_of((tiles - 1 - i) * plan.rows, plan.rows)
        for group in groups:
            _readers(plan, refs, out, x_ref, g_ref, limit_ref, first, chunk, group)
            dx = _of_seen(plan, refs, g_ref, limit_ref, first + _EDGE, plan.rows, group)
            out["dx"][pl.ds(first, plan.rows), group] = dx.astype(out["dx"].dtype)
        return carry

    jax.lax.fori_loop(np.int32(0), np.int32(tiles), tile, np.int32(0))

    @pl.when(chunk == 0)
    def _():
        for group in groups:
            out["dtail"][:, group] = _of_seen(plan, refs, g_ref, limit_ref, 0, _EDGE, group)


def _earlier(window, distance: int):
    """A tile, each row as it stands ``distance`` rows before, from the tile with eight rows more before it."""
    return pltpu.roll(window, distance, 0)[_MORE:] if distance else window[_MORE:]


def _later(window, distance: int):
    """A tile, each row as it stands ``distance`` rows after, from the tile with eight rows more after it."""
    rows = window.shape[0]
    return pltpu.roll(window, rows - distance, 0)[: rows - _MORE] if distance else window[: rows - _MORE]


def _select(mask, values):
    return values if mask is None else jnp.where(mask, values, jnp.zeros_like(values))


def _readers(plan: _Plan, refs: dict, out: dict, x_ref, g_ref, limit_ref, first, chunk, group) -> None:
    """g of a tile, from dy and the tokens it sees; adds its shares to the sums."""
    rows = plan.rows
    dy = refs["dy"][pl.ds(first, rows), group].astype(plan.dtype)
    inside = None
    if plan.time % plan.chunk:  # beyond the array, memory holds anything
        position = chunk * plan.chunk + first + jax.lax.broadcasted_iota(jnp.int32, dy.shape, 0)
        inside = position < plan.time
        dy = _select(inside, dy)
    window, seen = x_ref[pl.ds(first + (_EDGE - _MORE), rows + _MORE), group], {}
    limit = limit_ref[pl.ds(first + _EDGE, rows), : dy.shape[1]] if plan.limited else None
    for distance, tap in taps(plan.width):
        tokens = _select(inside, _earlier(window, distance))
        seen[tap] = tokens if limit is None or distance == 0 else _select(distance <= limit, tokens)
    g = dy
    if plan.silu:
        y = refs["bias"][:, group]
        for tap, tokens in seen.items():
            y = y + refs["weight"][tap : tap + 1, group] * tokens
        gate = 1 / (1 + jnp.exp(-y))
        g = dy * (gate * (1 + y * (1 - gate)))
    g_ref[pl.ds(first + _EDGE, rows), group] = g
    for tap, tokens in seen.items():
        out["sums"][tap : tap + 1, group] += (g * tokens).sum(axis=0, keepdims=True)
    out["sums"][plan.width :, group] += g.sum(axis=0, keepdims=True)


def _of_seen(plan: _Plan, refs: dict, g_ref, limit_ref, first, rows: int, group):
    """The gradient of tokens, from the g of all that see them. ``first``: a row of the scratch."""
    here = pl.ds(first, rows + _MORE)
    window, total = g_ref[here, group], 0
    limit = limit_ref[here, : window.shape[1]] if plan.limited else None
    for distance, tap in taps(plan.width):
        g = window if limit is None or distance == 0 else _select(distance <= limit, window)
        total = total + refs["weight"][tap : tap + 1, group] * _later(g, distance)
    return total
