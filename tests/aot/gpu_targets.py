"""NVIDIA GPUs that are not here, to compile for: XLA's description of an H100, and what a Triton kernel needs of one.

XLA's compiler for GPU is in JAX's CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt, without NVIDIA's libraries).
"""

import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from lcx.planning.targets import GPU_TARGETS

MULTIPROCESSORS = 132
SHARED_MEMORY = 228 * 1024  # of a multiprocessor
# An H100 has no autotuning to do where there is none; what the tests' conftest sets for speed on CPU is undone.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0", "xla_backend_optimization_level": "3"}

H100 = GPU_TARGETS["h100"]


def h100_mesh() -> Mesh:
    """Eight H100s, two along each of data, seq and tensor; skips the test where their compiler is not installed."""
    for package in ("jax_cuda13_plugin", "jax_triton"):
        pytest.importorskip(package, reason=f"{package}, part of the compiler for GPU, is not installed")
    devices = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x8x1").devices
    return Mesh(np.array(devices).reshape(2, 2, 2), ("data", "seq", "tensor"))


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
      registers, spills: of a thread, in numbers and in bytes.
      shared_memory: bytes of a program.
      conversions: changes of layout, which go through shared memory or between lanes.
      seconds: that compilation took.
    """

    registers: int
    spills: int
    shared_memory: int
    conversions: int
    seconds: float


def compile_kernel(
    kernel, types: list[str], constants: dict, warps: int, capability: int, stages: int = 1
) -> Resources:
    """Compiles a Triton kernel down to machine code, as jax-triton would, and reads off its needs.

    Args:
      kernel: a function under `triton.jit`.
      types: of its parameters before the constants: "*bf16" for a pointer, "i32" for a scalar.
      constants: the values of the others.
      capability: 90 for an H100, 80 for an A100.
      stages: loads that run ahead in loops.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", cache)
        started = time.perf_counter()
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        seconds = time.perf_counter() - started
    registers, stack = _usage(compiled.asm["cubin"])
    conversions = compiled.asm["ttgir"].count("ttg.convert_layout")
    return Resources(registers, stack, compiled.metadata.shared, conversions, seconds)


def _usage(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread; a kernel without arrays of its own stacks spills."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(binary)
        listing = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", listing)
    return int(found[1]), int(found[2]) + int(found[3])
