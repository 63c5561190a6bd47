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
    return _kernels(arguments, static).refusal(arguments, static)


def scan(arguments: Arguments, static: Static) -> tuple[jax.Array | None, SegmentState]:
    """The backend; see `arguments.py`. For calls without `refusal`."""
    return _kernels(arguments, static).scan(vary_alike(arguments), static)


def _kernels(arguments: Arguments, static: Static):
    # Imported when first used: they need more than JAX's core.
    from lcx_kernels.chunked_memory import pallas_channels, pallas_inclusive, pallas_segments

    if static.segmented:
        return pallas_segments
    by_channel = arguments.log_decay is not None and arguments.log_decay.ndim == 4
    return pallas_channels if by_channel else pallas_inclusive
