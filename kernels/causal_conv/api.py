"""The depthwise causal convolution: one signature over all backends, with its checks."""

import jax
import jax.numpy as jnp

from lcx_kernels.backends import resolve_backend
from lcx_kernels.causal_conv import reference, xla
from lcx_kernels.checks import check

_CONVS = {"reference": reference.convolve, "xla": xla.convolve}
_AUTO = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    tail: jax.Array | None = None,
    lookback: jax.Array | None = None,
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
      backend: "auto" (by platform), "reference" or "xla".

    Returns:
      y [batch, time, channels] in x's dtype, and the tail for the tokens after x, [batch, width - 1, channels] in the
      dtype of ``tail`` (of x if there was none).

    Raises:
      ValueError: an argument has a wrong shape or dtype, or the backend's name is unknown.
      BackendUnavailable: the named backend cannot run here.
    """
    name = resolve_backend(backend, _CONVS, _AUTO)
    check("x", x, "[batch, time, channels]", None, None, None)
    batch, time, channels = x.shape
    check("weight", weight, "[channels, width]", channels, None)
    width = weight.shape[1]
    check("bias", bias, "[channels]", channels)
    check("tail", tail, "[batch, width - 1, channels]", batch, width - 1, channels)
    check("lookback", lookback, "[batch, time]", batch, time, kind=jnp.integer)
    dtype = jnp.result_type(jnp.float32, *(array for array in (x, weight, bias, tail) if array is not None))
    if tail is None:
        tail = jnp.broadcast_to(jnp.zeros_like(x[:, :1]), (batch, width - 1, channels))
    tokens = jnp.concatenate([tail.astype(jnp.result_type(x, tail)), x.astype(jnp.result_type(x, tail))], axis=1)
    weight = weight.astype(dtype)
    bias = jnp.zeros_like(weight[:, 0]) if bias is None else bias.astype(dtype)
    y = _CONVS[name](tokens, weight, bias, lookback)
    return y.astype(x.dtype), tokens[:, time:].astype(tail.dtype)
