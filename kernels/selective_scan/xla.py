"""The selective scan in plain XLA operations: the default on CPU.

The scan goes token by token, so that the state h of one token is all that lives at a time. The backward pass needs h
of every token: the forward pass keeps one state per chunk, and the backward pass recomputes a chunk's states into one
small buffer before it walks back through them (Gu and Dao, 2023, section 3.3.2). With g the gradient of h,

    g[t]          = dy[t] C[t] + exp(dt[t+1] A) g[t+1]
    dC[t]         = h[t] dy[t]             summed over channels
    dB[t]         = g[t] dt[t] x[t]        summed over channels
    d(dt[t] x[t]) = g[t] B[t]              summed over the state
    d(dt[t] A)    = exp(dt[t] A) g[t] h[t-1]

Layout is what speed on CPU depends on. States are [rows, state, channels] with channels last, because XLA vectorises
over the last axis. A row is a batch element; but XLA's code for a single row is several times slower, so a lone batch
element is laid out as two rows of half its channels, and of an odd number one more, of zeros. Tokens are put in that
order chunk by chunk: a transposed copy of a whole sequence would cost more than a tenth of the time.
"""

import functools

import jax
import jax.numpy as jnp

from lcx_kernels.residuals import named

# A chunk's recomputed states should stay in the cache; one state per chunk stays in memory until the backward pass.
_CHUNK_SIZE = 16


def scan(x, dt, A, B, C, initial_state, reset, chunk_size) -> tuple[jax.Array | None, jax.Array]:
    """x, dt [batch, time, channels]; A [channels, state]; B, C [batch, time, state]; all of one dtype.

    Returns y [batch, time, channels] = h C (None if C is None) and the final state [batch, channels, state].
    """
    batch, time, channels = x.shape
    chunk_size = min(chunk_size or _CHUNK_SIZE, time)
    splits = 2 if batch == 1 and channels > 1 else 1

    def pad(tokens):  # with zeros: a token of dt = 0 leaves the state as it is
        return jnp.pad(tokens, [(0, 0), (0, -time % chunk_size)] + [(0, 0)] * (tokens.ndim - 2))

    def rows(state):
        state = jnp.pad(state, ((0, 0), (0, -channels % splits), (0, 0)))
        return jnp.swapaxes(state.reshape(batch * splits, -(-channels // splits), -1), 1, 2)

    x, dt, B, C, reset = jax.tree.map(pad, (x, dt, B, C, reset))
    A = rows(jnp.broadcast_to(A, initial_state.shape))
    y, final_state = _scan(chunk_size, x, dt, A, B, C, rows(initial_state), reset)
    final_state = jnp.swapaxes(final_state, 1, 2).reshape(batch, -1, initial_state.shape[2])[:, :channels]
    return None if C is None else y[:, :time], final_state


def _read(tokens, index, size: int, splits: int, shared: bool):
    """Chunk ``index`` of arrays [batch, time, ...] as [size, rows, ...], for a tree of arrays (None stays None).

    Their last axis is channels, dealt out to the rows of a batch element, or it is ``shared`` by the rows.
    """

    def read(array):
        chunk = jnp.swapaxes(jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1), 0, 1)
        if shared:
            return jnp.repeat(chunk, splits, axis=1)
        chunk = jnp.pad(chunk, ((0, 0), (0, 0), (0, -array.shape[2] % splits)))
        return chunk.reshape(size, array.shape[0] * splits, -(-array.shape[2] // splits))

    return jax.tree.map(read, tokens)


def _write(tokens, index, chunks, shared: bool):
    """Write gradients or outputs where ``_read`` reads; what is shared sums over the rows of a batch element."""

    def write(array, chunk):
        size, batch = chunk.shape[0], array.shape[0]
        if shared:
            chunk = chunk.reshape(size, batch, -1, chunk.shape[2]).sum(axis=2)
        chunk = jnp.swapaxes(chunk.reshape(size, batch, -1)[:, :, : array.shape[2]], 0, 1)
        return jax.lax.dynamic_update_slice_in_dim(array, chunk, index * size, axis=1)

    return jax.tree.map(write, tokens, chunks)


def _keep(state: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Zero the rows of ``state`` where ``reset`` [rows]: by selection, so that not even a NaN passes."""
    return state if reset is None else jnp.where(reset[:, None, None], jnp.zeros_like(state), state)


def _advance(A, h, x, dt, B) -> jax.Array:
    """The state after one token; h [rows, state, channels], x and dt [rows, channels], B [rows, state]."""
    return jnp.exp(dt[:, None, :] * A) * h + (dt * x)[:, None, :] * B[:, :, None]


def _sum_over_channels(state: jax.Array, per_channel: jax.Array) -> jax.Array:
    return jnp.einsum("rnd,rd->rn", state, per_channel, precision=jax.lax.Precision.HIGHEST)


def _forward_chunk(A, h, x, dt, B, C, reset):
    """Return the state after the chunk, and its y (None if C is None)."""

    def token(h, inputs):
        x, dt, B, C, reset = inputs
        h = _advance(A, _keep(h, reset), x, dt, B)
        return h, None if C is None else (h * C[:, :, None]).sum(axis=1)

    return jax.lax.scan(token, h, (x, dt, B, C, reset))


def _backward_chunk(A, h, x, dt, B, C, reset, dy, g, dA, found):
    """Go back through a chunk, given the state h before it and the gradient g of the state after it.

    ``found`` [size, rows, state, channels] is scratch memory. Returns (g before the chunk, dA with the chunk's share
    added, the scratch) and the gradients of x, dt, B and C.
    """

    def recompute(carry, inputs):
        """One token forward: note the state that it found, after the reset."""
        h, found = carry
        position, x, dt, B, reset, dy = inputs
        h = _keep(h, reset)
        found = jax.lax.dynamic_update_index_in_dim(found, h, position, 0)
        h = _advance(A, h, x, dt, B)
        return (h, found), None if dy is None else _sum_over_channels(h, dy)

    def token(carry, inputs):
        """One token back: from the gradient of the state it left to that of the state it found."""
        g, dA = carry
        x, dt, B, C, later_reset, dy, found = inputs
        g = _keep(g, later_reset)
        if dy is not None:
            g = g + dy[:, None, :] * C[:, :, None]
        dB = _sum_over_channels(g, dt * x)
        ddtx = (g * B[:, :, None]).sum(axis=1)
        g = jnp.exp(dt[:, None, :] * A) * g
        d_exponent = g * found
        ddt = ddtx * x + (d_exponent * A).sum(axis=1)
        dA = dA + d_exponent * dt[:, None, :]
        return (g, dA), (ddtx * dt, ddt, dB)

    positions = jnp.arange(x.shape[0], dtype=jnp.uint32)
    (_, found), dC = jax.lax.scan(recompute, (h, found), (positions, x, dt, B, reset, dy))
    later_reset, first_reset = None, None
    if reset is not None:
        # The token before a reset drops g; if the reset token zeroed it, a NaN in that token's dt would pass through.
        later_reset, first_reset = jnp.roll(reset, -1, axis=0).at[-1].set(False), reset[0]
    (g, dA), (dx, ddt, dB) = jax.lax.scan(token, (g, dA), (x, dt, B, C, later_reset, dy, found), reverse=True)
    return (_keep(g, first_reset), dA, found), (dx, ddt, dB, dC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk_size, x, dt, A, B, C, h, reset):
    """x, dt [batch, time, all channels]; B, C [batch, time, state]; A, h [rows, state, channels]; whole chunks only."""
    return _forward(chunk_size, x, dt, A, B, C, h, reset)[0]


def _forward(chunk_size, x, dt, A, B, C, h, reset):
    read = functools.partial(_read, size=chunk_size, splits=h.shape[0] // x.shape[0])

    def chunk(carry, index):
        h, y = carry
        x_dt = read((x, dt), index, shared=False)
        final, y_chunk = _forward_chunk(A, h, *x_dt, *read((B, C, reset), index, shared=True))
        return (final, _write(y, index, y_chunk, shared=False)), h

    chunks = jnp.arange(x.shape[1] // chunk_size, dtype=jnp.int32)
    (final, y), borders = jax.lax.scan(chunk, (h, None if C is None else jnp.zeros_like(x)), chunks)
    return (y, final), (x, dt, A, B, C, borders, reset)


def _backward(chunk_size, residuals, cotangents):
    x, dt, A, B, C, borders, reset = residuals
    dy, g = cotangents
    read = functools.partial(_read, size=chunk_size, splits=g.shape[0] // x.shape[0])

    def chunk(carry, inputs):
        (g, dA, found), of_channels, of_shared = carry
        index, h = inputs
        x_, dt_, dy_ = read((x, dt, dy), index, shared=False)
        B_, C_, reset_ = read((B, C, reset), index, shared=True)
        state, (dx, ddt, dB, dC) = _backward_chunk(A, h, x_, dt_, B_, C_, reset_, dy_, g, dA, found)
        of_channels = _write(of_channels, index, (dx, ddt), shared=False)
        return (state, of_channels, _write(of_shared, index, (dB, dC), shared=True)), None

    # One scratch buffer for all chunks: as an output of the inner scan it would be cleared for each.
    found = jnp.broadcast_to(jnp.zeros_like(g), (chunk_size, *g.shape))
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    carry = (g, zeros(A), found), zeros((x, dt)), zeros((B, C))
    chunks = jnp.arange(x.shape[1] // chunk_size, dtype=jnp.int32)
    ((g, dA, _), (dx, ddt), (dB, dC)), _ = jax.lax.scan(chunk, carry, (chunks, borders), reverse=True)
    return dx, ddt, dA, dB, dC, g, None


_scan.defvjp(named(_forward), _backward)
