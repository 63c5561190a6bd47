"""The selective scan as two Pallas kernels for TPU, forward and backward, with everything around the scan fused.

A program holds the state [state, channels] of one batch row and one block of channels, channels on the 128 lanes of
vector registers, and goes through time chunk by chunk: the grid is (batch, blocks of channels, chunks), the last one
in order. Arrays [batch, time, channels] are read and written in the caller's dtype, one block [chunk, channels] at a
time, and widened in registers. Within a block, a tile of tokens (as many as one packed register has rows) is prepared
at once: step sizes with bias and softplus, later skip and gate. Then its tokens are walked one by one, unrolled.

B and C are wanted as columns [state, 1], so they come in transposed, [batch, state, time]: time on the lanes, which
also keeps memory free of lanes without data. A tile's columns are rotated to the first lanes, where their places are
known to the compiler.

The forward kernel also writes the state that each chunk starts from. The backward kernel goes through the chunks in
reverse: it recomputes a chunk's states into VMEM and walks back through them (formulas in xla.py). Sums over channels
(dB, dC) are written once per block of channels, sums over time (dA, dD, ddt_bias) once per batch row, and added up
outside: always in the same order.

No array is indexed by a flat offset here. Blocks are addressed by (row, chunk, block), and each of these is small
however large the array: batch * time * channels may exceed 2^31.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcx_kernels.backends import is_interpreted
from lcx_kernels.residuals import named
from lcx_kernels.selective_scan.arguments import Arguments
from lcx_kernels.varying import vary_alike, varying_axes, varying_struct

_LANES = 128
_LN2 = math.log(2)  # rates are divided by it: powers of 2 are what the hardware computes
_MARGIN = 6 * 2**20  # bytes of VMEM for the compiler's own use, above blocks and scratch

# State size up to the key: channels of a block at most, so that a chunk's states fit in VMEM. Wide blocks hide
# latencies and read B and C less often; two at least (of more than 128 channels) keep both cores of a v5p busy.
_BLOCKS = {16: 640, 32: 256}
# Bytes of a token's element up to the key: tokens of a chunk. Long chunks keep fewer states in memory; with these,
# blocks and scratch stay within the 16 MiB of VMEM that a v5e gives to a kernel by default, up to 64 states a channel.
_CHUNKS = {2: 256, 4: 128}


@dataclass(frozen=True)
class _Plan:
    """What is known of a call before it is traced."""

    batch: int
    time: int
    channels: int
    state: int
    tokens: int  # of a tile: walked unrolled
    lanes: int  # columns of B and C that are loaded at once
    chunk: int  # tokens of a grid step
    block: int  # channels of a grid step
    softplus: bool
    dtype: np.dtype
    interpret: bool

    @property
    def chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.block)

    @property
    def columns(self) -> int:
        """Of B and C in a chunk: its tokens, or more where one chunk is all and it is short."""
        return _round_up(self.chunk, self.lanes)

    @property
    def padded_channels(self) -> int:
        return self.blocks * self.block


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _entry(table: dict[int, int], key: int, otherwise: int) -> int:
    return next((value for bound, value in table.items() if key <= bound), otherwise)


def _plan(arguments: Arguments, softplus: bool, chunk_size: int | None) -> _Plan:
    (batch, time, channels), state = arguments.x.shape, arguments.A.shape[1]
    per_token = [arguments.x, arguments.dt] + ([] if arguments.z is None else [arguments.z])
    sizes = [array.dtype.itemsize for array in per_token]
    tokens = 16 if min(sizes) < 4 else 8
    interpret = is_interpreted()
    lanes = 2 * tokens if interpret and time <= 2 * _LANES else _LANES  # few, so that short tests cross chunks
    chunk = _round_up(chunk_size or _entry(_CHUNKS, max(sizes), _LANES), lanes)
    chunk = min(chunk, _round_up(time, tokens))
    block = channels
    if channels > _LANES:
        blocks = max(2, -(-channels // _entry(_BLOCKS, state, _LANES)))
        block = _round_up(-(-channels // blocks), _LANES)
    dtype = np.dtype(arguments.dtype)
    return _Plan(batch, time, channels, state, tokens, lanes, chunk, block, softplus, dtype, interpret)


def scan(arguments: Arguments, dt_softplus: bool, chunk_size: int | None) -> tuple[jax.Array | None, jax.Array]:
    """The backend; see `arguments.py`. ``chunk_size`` is rounded up to a multiple of 128 tokens, or to all."""
    return _scan(_plan(arguments, dt_softplus, chunk_size), vary_alike(arguments))


def _pad(array: jax.Array, size: int) -> jax.Array:
    """``array`` with zeros added at the end of its last axis."""
    missing = size - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: _Plan, arguments: Arguments):
    outputs = _forward_call(plan, arguments, keep=False)
    return outputs.get("y"), _to_rows(plan, outputs["final"])


def _forward(plan, arguments):
    outputs = _forward_call(plan, arguments, keep=True)
    return (outputs.get("y"), _to_rows(plan, outputs["final"])), (arguments, outputs["borders"])


def _backward(plan, residuals, cotangents):
    arguments, borders = residuals
    found = _backward_call(plan, arguments, borders, *cotangents)
    per_channel = slice(None, plan.channels)

    def of_shared(partial, like):
        """[batch, blocks, state, time] to [batch, time, state]."""
        return jnp.swapaxes(partial.sum(axis=1)[:, :, : like.shape[1]], 1, 2).astype(like.dtype)

    def of_weight(partial, like):
        """[batch, 1, channels] to [channels]."""
        return partial.sum(axis=(0, 1))[per_channel].astype(like.dtype)

    gradients = {name: found["d" + name] for name in ("x", "dt", "z") if "d" + name in found}
    gradients |= {name: of_shared(found["d" + name], getattr(arguments, name)) for name in "BC" if "d" + name in found}
    for name in ("D", "dt_bias"):
        if "d" + name in found:
            gradients[name] = of_weight(found["d" + name], getattr(arguments, name))
    gradients["A"] = found["dA"].sum(axis=0).T[per_channel].astype(arguments.A.dtype)
    gradients["initial_state"] = _to_rows(plan, found["dstate"])
    missing = dict.fromkeys(set(Arguments._fields) - gradients.keys())
    return (Arguments(**gradients, **missing),)


_scan.defvjp(named(_forward), _backward)


def _to_rows(plan: _Plan, state: jax.Array) -> jax.Array:
    """[batch, state, padded channels] to [batch, channels, state]."""
    return jnp.swapaxes(state[:, :, : plan.channels], 1, 2)


# The calls: arrays as the kernels want them, with their blocks.


class _Blocks:
    """Specs of blocks by kind of array; ``reverse`` goes through the chunks from the last to the first."""

    def __init__(self, plan: _Plan, reverse: bool):
        last = plan.chunks - 1

        def chunk(t):
            return last - t if reverse else t

        rows, columns, state, block = plan.chunk, plan.columns, plan.state, plan.block
        self.channels = pl.BlockSpec((None, rows, block), lambda b, c, t: (b, chunk(t), c))
        self.shared = pl.BlockSpec((None, state, columns), lambda b, c, t: (b, 0, chunk(t)))
        self.partial = pl.BlockSpec((None, None, state, columns), lambda b, c, t: (b, c, 0, chunk(t)))
        self.reset = pl.BlockSpec((None, 1, columns), lambda b, c, t: (b, 0, chunk(t)), memory_space=pltpu.SMEM)
        self.rates = pl.BlockSpec((state, block), lambda b, c, t: (0, c))
        self.weight = pl.BlockSpec((1, block), lambda b, c, t: (0, c))
        self.state = pl.BlockSpec((None, state, block), lambda b, c, t: (b, 0, c))
        self.row = pl.BlockSpec((None, 1, block), lambda b, c, t: (b, 0, c))
        self.border = pl.BlockSpec((None, None, state, block), lambda b, c, t: (b, chunk(t), 0, c))


def _inputs(plan: _Plan, arguments: Arguments, blocks: _Blocks) -> tuple[dict, dict]:
    """What both kernels read: arrays and specs by name. Absent arguments are absent."""

    def shared(array):
        return None if array is None else _pad(jnp.swapaxes(array, 1, 2), plan.chunks * plan.columns)

    def weight(array):
        return None if array is None else _pad(array.astype(plan.dtype)[None], plan.padded_channels)

    reset = None if arguments.reset is None else arguments.reset.astype(jnp.int32)[:, None]
    arrays_and_specs = {
        "x": (arguments.x, blocks.channels),
        "dt": (arguments.dt, blocks.channels),
        "z": (arguments.z, blocks.channels),
        "B": (shared(arguments.B), blocks.shared),
        "C": (shared(arguments.C), blocks.shared),
        "A": (_pad(arguments.A.astype(plan.dtype).T / _LN2, plan.padded_channels), blocks.rates),
        "D": (weight(arguments.D), blocks.weight),
        "dt_bias": (weight(arguments.dt_bias), blocks.weight),
        "reset": (None if reset is None else _pad(reset, plan.chunks * plan.columns), blocks.reset),
    }
    given = {name: pair for name, pair in arrays_and_specs.items() if pair[0] is not None}
    return {name: array for name, (array, _) in given.items()}, {name: spec for name, (_, spec) in given.items()}


def _of_state(plan: _Plan, state: jax.Array) -> jax.Array:
    """[batch, channels, state] to [batch, state, padded channels]."""
    return _pad(jnp.swapaxes(state.astype(plan.dtype), 1, 2), plan.padded_channels)


def _call(kernel, name, plan: _Plan, inputs: dict, in_specs: dict, outputs: dict, scratch: list) -> dict:
    """Runs a kernel. ``outputs``: by name, (shape, dtype, spec); ``scratch``: shapes, of the arithmetic's dtype."""
    axes = varying_axes(inputs)
    out_shape = {key: varying_struct(shape, dtype, axes) for key, (shape, dtype, _) in outputs.items()}
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.batch, plan.blocks, plan.chunks),
        in_specs=[in_specs],
        out_specs={key: spec for key, (_, _, spec) in outputs.items()},
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, plan.dtype) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(plan, inputs, in_specs, outputs, scratch) + _MARGIN,
        ),
        interpret=plan.interpret,
        name=name,
    )
    return call(inputs)


def _vmem_bytes(plan: _Plan, inputs: dict, in_specs: dict, outputs: dict, scratch: list) -> int:
    """Of all blocks, twice (one is computed on while the next is copied), and of the scratch."""

    def size(shape, dtype):
        itemsize = np.dtype(dtype).itemsize
        *outer, rows, lanes = (1 if part is None else part for part in shape)
        return int(np.prod(outer)) * _round_up(rows, 32 // itemsize) * _round_up(lanes, _LANES) * itemsize

    blocks = [(in_specs[name].block_shape, array.dtype) for name, array in inputs.items()]
    blocks += [(spec.block_shape, dtype) for _, dtype, spec in outputs.values()]
    return sum(2 * size(*block) for block in blocks) + sum(size(shape, plan.dtype) for shape in scratch)


def _forward_call(plan: _Plan, arguments: Arguments, keep: bool) -> dict:
    """Returns y (unless C is None), the final state [batch, state, padded channels] and, to ``keep``, the borders."""
    blocks = _Blocks(plan, reverse=False)
    inputs, specs = _inputs(plan, arguments, blocks)
    inputs["initial"], specs["initial"] = _of_state(plan, arguments.initial_state), blocks.state
    outputs = {"final": (inputs["initial"].shape, plan.dtype, blocks.state)}
    if arguments.C is not None:
        outputs["y"] = (arguments.x.shape, arguments.x.dtype, blocks.channels)
    if keep:
        shape = (plan.batch, plan.chunks, plan.state, plan.padded_channels)
        outputs["borders"] = (shape, plan.dtype, blocks.border)
    scratch = [(plan.tokens, plan.block)]
    return _call(_forward_kernel, "selective_scan_forward", plan, inputs, specs, outputs, scratch)


def _backward_call(plan: _Plan, arguments: Arguments, borders, dy, dfinal) -> dict:
    """Returns gradients by name: dx, ddt, dz; partial dB, dC, dA, dD, ddt_bias; dstate, of the initial state."""
    blocks = _Blocks(plan, reverse=True)
    inputs, specs = _inputs(plan, arguments, blocks)
    inputs["borders"], specs["borders"] = borders, blocks.border
    inputs["dfinal"], specs["dfinal"] = _of_state(plan, dfinal), blocks.state
    shared = (plan.batch, plan.blocks, plan.state, plan.chunks * plan.columns), plan.dtype, blocks.partial
    state = inputs["dfinal"].shape, plan.dtype, blocks.state
    row = (plan.batch, 1, plan.padded_channels), plan.dtype, blocks.row
    outputs = {"dA": state, "dstate": state, "dB": shared}
    outputs |= {"d" + name: (inputs[name].shape, inputs[name].dtype, blocks.channels) for name in ("x", "dt")}
    if dy is not None:
        inputs["dy"], specs["dy"] = dy, blocks.channels
        outputs["dC"] = shared
    if "z" in inputs:
        outputs["dz"] = (inputs["z"].shape, inputs["z"].dtype, blocks.channels)
    outputs |= {"d" + name: row for name in ("D", "dt_bias") if name in inputs}
    scratch = [(plan.tokens, plan.block)] * 2 + [(plan.chunk, plan.state, plan.block)]
    return _call(_backward_kernel, "selective_scan_backward", plan, inputs, specs, outputs, scratch)


# The kernels. Values are [tokens, channels] for a tile, [state, channels] for a state.


def _tiles(plan: _Plan, chunk, body, carry, reverse: bool = False):
    """carry = body(first token of the tile, counted from the chunk's; carry), for each tile with tokens in it."""
    count = np.int32(plan.chunk // plan.tokens)
    if plan.time % plan.chunk:
        count = jnp.minimum(count, pl.cdiv(plan.time - chunk * plan.chunk, np.int32(plan.tokens)))

    def tile(i, carry):
        i = count - 1 - i if reverse else i
        return body(pl.multiple_of(i * plan.tokens, plan.tokens), carry)

    return jax.lax.fori_loop(np.int32(0), count, tile, carry)


def _inside(plan: _Plan, first, block, chunk):
    """Which elements of a tile of this block are in the arrays, as a mask; None for all."""
    mask, shape = None, (plan.tokens, plan.block)
    if plan.time % plan.chunk:
        position = chunk * plan.chunk + first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        mask = position < plan.time
    if plan.channels % plan.block:
        channel = block * plan.block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        mask = channel < plan.channels if mask is None else mask & (channel < plan.channels)
    return mask


def _read(plan: _Plan, ref, first, mask):
    """A tile, widened; 0 outside of the array, where memory holds anything."""
    tile = ref[pl.ds(first, plan.tokens), :].astype(plan.dtype)
    return tile if mask is None else jnp.where(mask, tile, jnp.zeros_like(tile))


def _read_steps(plan: _Plan, refs: dict, first, mask):
    """A tile of step sizes, and of what softplus was applied to. Outside of the array steps are 0: they keep states."""
    raw = _read(plan, refs["dt"], first, mask)
    if "dt_bias" in refs:
        raw = raw + refs["dt_bias"][...]
    steps = jnp.maximum(raw, 0) + jnp.log1p(jnp.exp(-jnp.abs(raw))) if plan.softplus else raw
    return (steps if mask is None else jnp.where(mask, steps, jnp.zeros_like(steps))), raw


def _group(plan: _Plan, first):
    """Where the group of columns of a tile starts, and the place of the tile's first column in it."""
    start = pl.multiple_of(jax.lax.div(first, np.int32(plan.lanes)) * plan.lanes, plan.lanes)
    return pl.ds(start, plan.lanes), first - start


def _read_columns(plan: _Plan, ref, first):
    """B or C of a tile as [state, lanes], token j in lane j."""
    group, place = _group(plan, first)
    return pltpu.roll(ref[:, group].astype(plan.dtype), jax.lax.rem(plan.lanes - place, np.int32(plan.lanes)), 1)


def _keep(refs: dict, state, token):
    """Zero a state at a reset: by selection, so that not even a NaN passes."""
    return jax.lax.select(refs["reset"][0, token] != 0, jnp.zeros_like(state), state) if "reset" in refs else state


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _forward_kernel(plan: _Plan, refs: dict, out: dict, y_ref):
    """`out["final"]` carries the state from chunk to chunk. Scratch: a tile of h C."""
    block, chunk = pl.program_id(1), pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        out["final"][...] = refs["initial"][...]

    if "borders" in out:
        out["borders"][...] = out["final"][...]

    def tile(first, h):
        mask = _inside(plan, first, block, chunk)
        x = _read(plan, refs["x"], first, mask)
        steps, _ = _read_steps(plan, refs, first, mask)
        inputs = steps * x
        A, B = refs["A"][...], _read_columns(plan, refs["B"], first)
        C = _read_columns(plan, refs["C"], first) if "y" in out else None
        for j in range(plan.tokens):
            h = jnp.exp2(steps[j : j + 1] * A) * _keep(refs, h, first + j) + inputs[j : j + 1] * B[:, j : j + 1]
            if "y" in out:
                y_ref[j : j + 1] = (h * C[:, j : j + 1]).sum(axis=0, keepdims=True)
        if "y" in out:
            y = y_ref[...]
            if "D" in refs:
                y = y + refs["D"][...] * x
            if "z" in refs:
                z = _read(plan, refs["z"], first, mask)
                y = y * (z * _sigmoid(z))
            out["y"][pl.ds(first, plan.tokens), :] = y.astype(out["y"].dtype)
        return h

    out["final"][...] = _tiles(plan, chunk, tile, out["final"][...])


def _backward_kernel(plan: _Plan, refs: dict, out: dict, *scratch):
    """`out["dstate"]` carries the gradient of the state from chunk to chunk, backwards."""
    block, step = pl.program_id(1), pl.program_id(2)
    chunk = plan.chunks - 1 - step

    @pl.when(step == 0)
    def _():
        out["dstate"][...] = refs["dfinal"][...]
        for name in ("dA", "dD", "ddt_bias"):
            if name in out:
                out[name][...] = jnp.zeros_like(out[name])

    _recompute(plan, refs, out, block, chunk, *scratch)
    _walk_back(plan, refs, out, block, chunk, *scratch)


def _ungated(plan: _Plan, refs: dict, first, mask):
    """A tile of the gradient of h C + D x."""
    dy = _read(plan, refs["dy"], first, mask)
    if "z" in refs:
        z = _read(plan, refs["z"], first, mask)
        dy = dy * (z * _sigmoid(z))
    return dy


def _collect(plan: _Plan, ref, first, columns: dict):
    """Writes a tile's columns of dB or dC, [state, 1] each: ``columns`` by the token's place in the tile."""
    group, place = _group(plan, first)
    written = ref[:, group]
    lane = jax.lax.broadcasted_iota(jnp.int32, written.shape, 1)
    for j, column in columns.items():
        written = jnp.where(lane == place + j, column, written)
    ref[:, group] = written


def _recompute(plan: _Plan, refs: dict, out: dict, block, chunk, y_ref, _, found_ref):
    """Forward through the chunk: ``found_ref`` [chunk, state, channels] notes the state that each token found.

    Also dC, and dz and dD, which need y.
    """

    def tile(first, h):
        mask = _inside(plan, first, block, chunk)
        x = _read(plan, refs["x"], first, mask)
        steps, _ = _read_steps(plan, refs, first, mask)
        inputs = steps * x
        A, B, dC = refs["A"][...], _read_columns(plan, refs["B"], first), {}
        if "dC" in out:
            dy = _ungated(plan, refs, first, mask)
            C = _read_columns(plan, refs["C"], first)
        for j in range(plan.tokens):
            h = _keep(refs, h, first + j)
            found_ref[first + j] = h
            h = jnp.exp2(steps[j : j + 1] * A) * h + inputs[j : j + 1] * B[:, j : j + 1]
            if "dC" in out:
                dC[j] = (h * dy[j : j + 1]).sum(axis=1, keepdims=True)
            if "dz" in out:
                y_ref[j : j + 1] = (h * C[:, j : j + 1]).sum(axis=0, keepdims=True)
        if "dC" in out:
            _collect(plan, out["dC"], first, dC)
        if "dD" in out:
            out["dD"][...] += (dy * x).sum(axis=0, keepdims=True)
        if "dz" in out:
            y, z = y_ref[...], _read(plan, refs["z"], first, mask)
            if "D" in refs:
                y = y + refs["D"][...] * x
            gate = _sigmoid(z)
            dz = _read(plan, refs["dy"], first, mask) * y * (gate * (1 + z * (1 - gate)))
            out["dz"][pl.ds(first, plan.tokens), :] = dz.astype(out["dz"].dtype)
        return h

    _tiles(plan, chunk, tile, refs["borders"][...])


def _walk_back(plan: _Plan, refs: dict, out: dict, block, chunk, d_ref, dsteps_ref, found_ref):
    """Back through the chunk with g, the gradient of the state that a token left.

    Scratch: tiles of the gradients of dt x, and of dt through the decays, over ln 2.
    """

    def tile(first, carry):
        g, dA = carry
        mask = _inside(plan, first, block, chunk)
        x = _read(plan, refs["x"], first, mask)
        steps, raw = _read_steps(plan, refs, first, mask)
        inputs = steps * x
        A, B, dB = refs["A"][...], _read_columns(plan, refs["B"], first), {}
        if "dC" in out:
            dy = _ungated(plan, refs, first, mask)
            C = _read_columns(plan, refs["C"], first)
        for j in reversed(range(plan.tokens)):
            if "dC" in out:
                g = g + dy[j : j + 1] * C[:, j : j + 1]
            dB[j] = (g * inputs[j : j + 1]).sum(axis=1, keepdims=True)
            d_ref[j : j + 1] = (g * B[:, j : j + 1]).sum(axis=0, keepdims=True)
            g = jnp.exp2(steps[j : j + 1] * A) * g
            exponent = g * found_ref[first + j]
            dsteps_ref[j : j + 1] = (exponent * A).sum(axis=0, keepdims=True)
            dA = dA + exponent * steps[j : j + 1]
            g = _keep(refs, g, first + j)
        _collect(plan, out["dB"], first, dB)
        dx, dsteps = d_ref[...] * steps, d_ref[...] * x + dsteps_ref[...] * _LN2
        if "D" in refs and "dC" in out:
            dx = dx + dy * refs["D"][...]
        if plan.softplus:
            dsteps = dsteps * _sigmoid(raw)
        if mask is not None:
            dsteps = jnp.where(mask, dsteps, jnp.zeros_like(dsteps))
        if "ddt_bias" in out:
            out["ddt_bias"][...] += dsteps.sum(axis=0, keepdims=True)
        out["dx"][pl.ds(first, plan.tokens), :] = dx.astype(out["dx"].dtype)
        out["ddt"][pl.ds(first, plan.tokens), :] = dsteps.astype(out["ddt"].dtype)
        return g, dA

    carry = out["dstate"][...], out["dA"][...]
    out["dstate"][...], out["dA"][...] = _tiles(plan, chunk, tile, carry, reverse=True)
