"""The backends, what each cannot do, and which one "auto" means."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lcx_kernels.backends import BackendUnavailable, resolve_backend, target_platform
from lcx_kernels.chunked_memory import pallas_tpu, reference, triton_gpu, xla
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.state import SegmentState

# Below so many tokens a call, as in decoding, a kernel has too little to do: XLA everywhere.
FEWEST_TOKENS = 8


class Backend(NamedTuple):
    """An implementation, and why it cannot do a call (None: it can): a function of shapes and dtypes."""

    scan: Callable[[Arguments, Static], tuple[jax.Array | None, SegmentState]]
    refusal: Callable[[Arguments, Static], str | None] = lambda arguments, static: None


BACKENDS = {
    "reference": Backend(reference.scan),
    "xla": Backend(xla.scan),
    "pallas_tpu": Backend(pallas_tpu.scan, pallas_tpu.refusal),
    "triton": Backend(triton_gpu.scan, triton_gpu.refusal),
}
# What "auto" tries on each platform; the last one can do everything.
AUTO = {"cpu": ("xla",), "gpu": ("triton", "xla"), "tpu": ("pallas_tpu", "xla")}


def select_backend(backend: str) -> str:
    """The name of the backend that `backend` means here, for calls that it can do.

    Raises: see `backends.resolve_backend`; BackendUnavailable also where a package is missing.
    """
    name = resolve_backend(backend, BACKENDS, {platform: names[0] for platform, names in AUTO.items()})
    if name == "triton":
        triton_gpu.require()
    return name


def choose(backend: str, arguments: Arguments, static: Static) -> Callable:
    """The implementation for this call.

    Raises:
      ValueError, BackendUnavailable: as `select_backend`; also where the backend named cannot do this call.
    """
    if backend == "auto" and arguments.k.shape[1] < FEWEST_TOKENS:
        return BACKENDS["xla"].scan
    name = select_backend(backend)
    if backend != "auto":
        if reason := BACKENDS[name].refusal(arguments, static):
            raise BackendUnavailable(f'backend "{name}" cannot do this call: {reason}')
        return BACKENDS[name].scan
    able = (name for name in AUTO[target_platform()] if not BACKENDS[name].refusal(arguments, static))
    return BACKENDS[next(able)].scan
