"""The selective scan: one signature over all backends, with its checks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.backends import BackendUnavailable, is_interpreted, resolve_backend
from lcx_kernels.checks import check
from lcx_kernels.selective_scan import cpp_cpu, reference, triton_gpu, triton_plan, xla
from lcx_kernels.selective_scan.arguments import Arguments, around, late, step_sizes

# From (Arguments, dt_softplus, chunk_size) to (y, final state).
_SCANS = {
    "reference": around(reference.scan),
    "xla": around(xla.scan),
    "cpp": cpp_cpu.scan,
    "pallas_tpu": late("pallas_tpu"),
    "triton": triton_gpu.scan,
}
_AUTO = {"cpu": cpp_cpu.SOURCE.default, "gpu": "triton", "tpu": "pallas_tpu"}
_FEW = 8  # tokens below which "auto" is xla anywhere: a kernel's launch and tiles are made for more, as decoding is not


def select_backend(backend: str, *, state: int | None = None, dtype: jnp.dtype | None = None) -> str:
    """The name of the implementation that `backend` means here, for calls of this kind.

    Args:
      state: numbers of a channel's state, if known.
      dtype: of the arithmetic, if known: float32, or float64 if any argument is.

    Raises:
      ValueError: `backend` is not a name.
      BackendUnavailable: the backend named cannot run here, a package is missing, or it cannot do such a call.
    """
    name = resolve_backend(backend, _SCANS, _AUTO)
    if reason := _refusal(name, state, dtype):
        if backend == "auto":
            return "xla"
        raise BackendUnavailable(f'backend "{name}" cannot do this call: {reason}')
    if name == "triton":
        triton_gpu.require()
    return name


def _refusal(name: str, state: int | None, dtype: jnp.dtype | None) -> str | None:
    """Why a backend cannot do such a call."""
    if name == "triton" and state is not None and state > triton_plan.LARGEST_STATE:
        return f"A has {state} states a channel, and it takes at most {triton_plan.LARGEST_STATE}"
    if name == "pallas_tpu" and dtype == jnp.float64 and not is_interpreted():
        return "TPUs have no float64"
    if name == "cpp":
        return cpp_cpu.SOURCE.missing()
    return None


class ScanSummary(NamedTuple):
    """What a stretch of tokens does to the state: ``final = decay(A) * initial + state``.

    Attributes:
      dt_sum: [batch, channels], the sum of the step sizes; of no meaning where ``reset`` is set.
      reset: bool [batch], whether a reset lies in the stretch, so that nothing of the initial state survives.
      state: [batch, channels, state], the final state of the stretch started from zero.
    """

    dt_sum: jax.Array
    reset: jax.Array
    state: jax.Array

    def decay(self, A: jax.Array) -> jax.Array:
        """The factor [batch, channels, state] on the initial state, exactly 0 where a reset lies in the stretch.

        ``A`` [channels, state] as given to the scan.
        """
        decay = jnp.exp(self.dt_sum[:, :, None] * A)
        return jnp.where(self.reset[:, None, None], jnp.zeros_like(decay), decay)

    def apply(self, initial: jax.Array | None, A: jax.Array) -> jax.Array:
        """The state after the stretch, [batch, channels, state], from that before it; None is zero."""
        return self.state if initial is None else self.decay(A) * initial + self.state

    def then(self, later: "ScanSummary", A: jax.Array) -> "ScanSummary":
        """The summary of this stretch followed by ``later``."""
        return ScanSummary(
            dt_sum=self.dt_sum + later.dt_sum,
            reset=self.reset | later.reset,
            state=later.decay(A) * self.state + later.state,
        )


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    initial_state: jax.Array | None = None,
    reset: jax.Array | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The selective state space recurrence (Mamba, arXiv 2312.00752, equation 2 with the Euler step for B).

        h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]        h[t-1] is 0 where reset[t]
        y[t] = (h[t] C[t] + D x[t]) silu(z[t])

    All arithmetic is in float32, or in float64 if any argument is. Everything of a floating dtype has a gradient,
    through the initial and from the final state. A token's outputs and gradients do not depend, to the last bit, on
    tokens that a reset or causality cuts off from it.

    Args:
      x: input, [batch, time, channels].
      dt: step sizes, [batch, time, channels]; not negative once ``dt_bias`` and softplus are applied.
      A: negative decay rates, [channels, state].
      B: input projection, [batch, time, state], shared by all channels.
      C: output projection, [batch, time, state], shared by all channels.
      D: skip weight, [channels].
      z: gate, [batch, time, channels].
      dt_bias: added to ``dt`` before the softplus, [channels].
      dt_softplus: whether ``dt`` passes through softplus.
      initial_state: h before the first token, [batch, channels, state]; None for zeros.
      reset: bool [batch, time]; True zeroes the state before that token, the initial state too.
      backend: "auto" (by platform), or the name of one: "reference", "xla", "cpp", "pallas_tpu" or "triton".
      chunk_size: tokens between two states that are kept for the backward pass; None for the backend's own choice.
        The reference keeps them all, whatever this says.

    Returns:
      y [batch, time, channels] in x's dtype, and the final state [batch, channels, state] in that of the arithmetic.

    Raises:
      ValueError: an argument has a wrong shape or dtype, or the backend's name is unknown.
      BackendUnavailable: the named backend cannot run here, or cannot do this call.
    """
    batch, time, channels, state = _check_map(x, dt, A, B, dt_bias, reset, chunk_size)
    check("C", C, "[batch, time, state]", batch, time, state)
    check("D", D, "[channels]", channels)
    check("z", z, "[batch, time, channels]", batch, time, channels)
    check("initial_state", initial_state, "[batch, channels, state]", batch, channels, state)
    arguments = _arguments(x, dt, A, B, C, D, z, dt_bias, initial_state, reset)
    return _SCANS[_pick(backend, arguments)](arguments, dt_softplus, chunk_size)


def selective_scan_summary(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    *,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    reset: jax.Array | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> ScanSummary:
    """What ``selective_scan`` of the same arguments does to the state, without its outputs.

    Cheaper than the scan, and it needs no initial state: devices that hold consecutive stretches of time compute their
    summaries side by side, compose them, and then scan from the right states.

    Args, dtypes and errors as in ``selective_scan``. Returns a ``ScanSummary``.
    """
    _check_map(x, dt, A, B, dt_bias, reset, chunk_size)
    arguments = _arguments(x, dt, A, B, None, None, None, dt_bias, None, reset)
    _, state = _SCANS[_pick(backend, arguments)](arguments, dt_softplus, chunk_size)
    dtype = arguments.dtype
    steps = step_sizes(dt.astype(dtype), None if dt_bias is None else dt_bias.astype(dtype), dt_softplus)
    any_reset = jnp.zeros_like(dt[:, 0, 0], dtype=bool) if reset is None else reset.any(axis=1)
    return ScanSummary(steps.sum(axis=1), any_reset, state)


def _pick(backend: str, arguments: Arguments) -> str:
    few = backend == "auto" and arguments.x.shape[1] < _FEW
    return select_backend("xla" if few else backend, state=arguments.A.shape[1], dtype=arguments.dtype)


def _arguments(x, dt, A, B, C, D, z, dt_bias, initial_state, reset) -> Arguments:
    # An empty state is made from x, so that inside a shard_map it varies over the mesh axes over which x varies.
    state = jnp.zeros_like(x[:, 0, :, None]) if initial_state is None else initial_state
    found = Arguments(x, dt, A, B, C, D, z, dt_bias, state, reset)
    state = jnp.broadcast_to(state, (x.shape[0], *A.shape)).astype(found.dtype)
    return found._replace(initial_state=state)


def _check_map(x, dt, A, B, dt_bias, reset, chunk_size) -> tuple[int, int, int, int]:
    """Check the arguments that the scan and its summary share; return batch, time, channels, state."""
    check("x", x, "[batch, time, channels]", None, None, None)
    batch, time, channels = x.shape
    if time == 0:
        raise ValueError(f"x: shape {x.shape}, expected at least one token of time")
    check("A", A, "[channels, state]", channels, None)
    state = A.shape[1]
    check("dt", dt, "[batch, time, channels]", batch, time, channels)
    check("B", B, "[batch, time, state]", batch, time, state)
    check("dt_bias", dt_bias, "[channels]", channels)
    check("reset", reset, "[batch, time]", batch, time, kind=bool)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}, expected at least 1")
    return batch, time, channels, state
