"""The depthwise causal convolution: one signature over all backends, with its checks."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcx_kernels.backends import BackendUnavailable, is_interpreted, resolve_backend
from lcx_kernels.causal_conv import cpp_cpu, reference, xla
from lcx_kernels.checks import check
from lcx_kernels.varying import vary_alike


def _late(module: str) -> Callable:
    """The backend ``convolve`` of a module of this package, imported when it first runs: it needs more than JAX."""

    def backend(*arguments):
        return importlib.import_module(f"lcx_kernels.causal_conv.{module}").convolve(*arguments)

    return backend


# From (silu, x, tail, weight, bias, lookback) to (y, next tail).
_CONVS = {
    "reference": reference.convolve,
    "xla": xla.convolve,
    "cpp": cpp_cpu.convolve,
    "pallas_tpu": _late("pallas_tpu"),
    "triton": _late("triton_gpu"),
}
_AUTO = {"cpu": cpp_cpu.SOURCE.default, "gpu": "triton", "tpu": "pallas_tpu"}
_FEW = 8  # tokens below which "auto" is xla anywhere: a kernel is made for more, as decoding is not
_LARGEST_WIDTH = 9  # of a filter that the kernels unroll


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    tail: jax.Array | None = None,
    lookback: jax.Array | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Convolve every channel with its own filter over the current and the preceding tokens.

        y[t] = bias + sum over j of weight[:, j] x[t - (width - 1) + j]        so weight[:, -1] meets the current token

    Computed in float32, or in float64 if any argument is. A tap that ``lookback`` drops is left out by selection: what
    lies there reaches neither an output nor a gradient, not even as a NaN.

    Args:
      x: input, [batch, time, channels].
      weight: filters, [channels, width].
      bias: [channels], or None.
      tail: the width - 1 tokens before x, [batch, width - 1, channels]; None for zeros.
      lookback: int [batch, time], how many tokens before itself each token may see; None for no limit.
      silu: whether y is passed through silu, before it is rounded to x's dtype; nothing more is kept for the backward
        pass, which computes the sums again.
      backend: "auto" (by platform), or the name of one: "reference", "xla", "cpp", "pallas_tpu" or "triton".

    Returns:
      y [batch, time, channels] in x's dtype, and the tail for the tokens after x, [batch, width - 1, channels] in the
      dtype of ``tail`` (of x if there was none).

    Raises:
      ValueError: an argument has a wrong shape or dtype, or the backend's name is unknown.
      BackendUnavailable: the named backend cannot run here, or not with these arguments.
    """
    check("x", x, "[batch, time, channels]", None, None, None)
    batch, time, channels = x.shape
    check("weight", weight, "[channels, width]", channels, None)
    width = weight.shape[1]
    check("bias", bias, "[channels]", channels)
    check("tail", tail, "[batch, width - 1, channels]", batch, width - 1, channels)
    check("lookback", lookback, "[batch, time]", batch, time, kind=jnp.integer)
    dtype = jnp.result_type(jnp.float32, *(array for array in (x, weight, bias, tail) if array is not None))
    name = _pick(backend, time, width, dtype)
    if tail is None:
        tail = jnp.broadcast_to(jnp.zeros_like(x[:, :1]), (batch, width - 1, channels))
    weight = weight.astype(dtype)
    bias = jnp.zeros_like(weight[:, 0]) if bias is None else bias.astype(dtype)
    return _CONVS[name](silu, *vary_alike((x, tail, weight, bias, lookback)))


def _pick(backend: str, time: int, width: int, dtype: jnp.dtype) -> str:
    name = resolve_backend(backend, _CONVS, _AUTO)
    reason = _refusal(name, width, dtype)
    if backend == "auto":
        return "xla" if reason or time < _FEW else name
    if reason:
        raise BackendUnavailable(f'backend "{name}" {reason}')
    return name


def _refusal(name: str, width: int, dtype: jnp.dtype) -> str | None:
    """Why the backend cannot do this call."""
    if name == "cpp":
        return cpp_cpu.SOURCE.missing()
    if name not in ("pallas_tpu", "triton"):
        return None
    if width > _LARGEST_WIDTH:
        return f"takes filters of at most {_LARGEST_WIDTH} taps, and these have {width}"
    if name == "pallas_tpu":
        return "has no float64" if dtype == jnp.float64 and not is_interpreted() else None
    return importlib.import_module("lcx_kernels.causal_conv.triton_gpu").missing()
