"""The chunked memory on TPU: which kernels do a call, and which calls they leave to XLA."""

import jax
import numpy as np

from lcx_kernels.backends import is_interpreted
from lcx_kernels.chunked_memory.arguments import Arguments, Static
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.varying import vary_alike


def refusal(arguments: Arguments, static: Static) -> str | None:
    """Why a call cannot be done, or None."""
    if arguments.dtype == np.float64 and not is_interpreted():
        return "no float64"
    return _kernels(static).refusal(arguments, static)


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """The backend; see `arguments.py`. For calls without `refusal`."""
    return _kernels(static).scan(vary_alike(arguments), static)


def _kernels(static: Static):
    # Imported when first used: they need more than JAX's core.
    from lcx_kernels.chunked_memory import pallas_inclusive, pallas_segments

    return pallas_segments if static.segmented else pallas_inclusive
