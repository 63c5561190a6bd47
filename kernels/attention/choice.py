"""The backends, what each cannot do, and which one "auto" means."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lcx_kernels.attention import cpp_cpu, cudnn, pallas_tpu, reference, triton_gpu, xla
from lcx_kernels.attention.arguments import Arguments, Static
from lcx_kernels.backends import BackendUnavailable, resolve_backend, target_platform

# Below so many queries a call, as in decoding, an accelerator's kernel has nothing to share between queries.
FEWEST_QUERIES = 8


class Backend(NamedTuple):
    """An implementation, and why it cannot do a call: a function of its arguments' shapes and dtypes.

    ``gradients`` (arguments, static, log_sum_exp, d_out, delta), the last three as of `api.attention_gradients`, gives
    (dq, dk, dv) in the dtypes of q, k and v.
    """

    run: Callable[[Arguments, Static], tuple[jax.Array, jax.Array]]
    gradients: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    refusal: Callable[[Arguments, Static], str | None] = lambda arguments, static: None


BACKENDS = {
    "reference": Backend(reference.attention, reference.gradients),
    "xla": Backend(xla.attention, xla.gradients),
    "cpp": Backend(cpp_cpu.attention, cpp_cpu.gradients, cpp_cpu.refusal),
    "pallas_tpu": Backend(pallas_tpu.attention, pallas_tpu.gradients, pallas_tpu.refusal),
    "triton": Backend(triton_gpu.attention, triton_gpu.gradients, triton_gpu.refusal),
    "cudnn": Backend(cudnn.attention, cudnn.gradients, cudnn.refusal),
}
# What "auto" tries on each platform; the last one can do everything.
AUTO = {"cpu": ("cpp", "xla"), "gpu": ("cudnn", "triton", "xla"), "tpu": ("pallas_tpu", "xla")}


def select_backend(backend: str) -> str:
    """The name of the backend that `backend` means here, for calls that it can do.

    Raises: see `backends.resolve_backend`.
    """
    auto = {platform: names[0] for platform, names in AUTO.items()} | {"cpu": cpp_cpu.SOURCE.default}
    return resolve_backend(backend, BACKENDS, auto)


def choose(backend: str, arguments: Arguments, static: Static) -> str:
    """The name of the backend for this call.

    Raises:
      ValueError, BackendUnavailable: as `select_backend`; also where the backend named cannot do this call.
    """
    name = select_backend(backend)
    if backend != "auto":
        if reason := BACKENDS[name].refusal(arguments, static):
            raise BackendUnavailable(f'backend "{name}" cannot do this call: {reason}')
        return name
    few = arguments.q.shape[1] < FEWEST_QUERIES and target_platform() != "cpu"
    names = ("xla",) if few else AUTO[target_platform()]
    return next(name for name in names if not BACKENDS[name].refusal(arguments, static))
