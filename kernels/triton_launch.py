"""Launching Triton kernels from JAX, through jax-triton. To import this, no Triton is needed."""

import importlib
from typing import Any

import jax

from lcx_kernels.backends import BackendUnavailable

# What programs are compiled for where no GPU is: an H100's.
_COMPUTE_CAPABILITY = 90


def missing() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    for package in ("triton", "jax_triton"):
        try:
            importlib.import_module(package)
        except ImportError as error:  # jax_triton is there and fails without JAX's CUDA plugin
            return f"needs triton, jax-triton and JAX's CUDA plugin; importing {package} says: {error}"
    return None


def require() -> None:
    """Raises BackendUnavailable, naming what is missing, where Triton kernels cannot be compiled."""
    if reason := missing():
        raise BackendUnavailable(f'backend "triton" {reason}')


def call(kernels: str, launch: Any) -> list[jax.Array]:
    """Runs a launch of a kernel of a module.

    Args:
      kernels: the module, "lcx_kernels.selective_scan.triton_kernels".
      launch: a `Launch` of a kernel's plan; its ``stages``, 1 where it has none, are for pipelined loads.
    """
    import jax_triton

    return jax_triton.triton_call(
        *launch.inputs,
        *launch.scalars,
        kernel=getattr(importlib.import_module(kernels), launch.kernel),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in launch.outputs],
        grid=(launch.programs,),
        name=f"{kernels.split('.')[-2]}_{launch.kernel}",
        num_warps=launch.warps,
        num_stages=getattr(launch, "stages", 1),
        compute_capability=None if jax.default_backend() == "gpu" else _COMPUTE_CAPABILITY,
        **launch.constants,
    )
