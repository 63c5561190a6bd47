"""`triton` attention, compiled for GPUs that are not here: by XLA for H100s, by Triton down to machine code.

What it computes is tested in tests/parity, in Triton's interpreter.
"""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.attention import attention, triton_gpu
from lcx_kernels.backends import compiling_for
from tests.aot import gpu_targets
from tests.aot.gpu_targets import Resources, compile_kernel

pytestmark = pytest.mark.aot

BY_HEAD, BY_ROW = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
HEADS, KV_HEADS = 32, 8  # of all devices: 16 and 4 on each
SHORT = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
CASES = {
    "causal": {"time": 8192},
    "window 2048": {"time": 32768, "window": 2048},
    "documents": {"time": 8192, "documents": True},
    "halo, documents": {"time": 4096, "window": 2048, "halo": 2047, "documents": True},
    "ring": {"time": 4096, "halo": 4096, "documents": True, "positions": True},
}


def trace(width, dtype, time, window=None, halo=0, documents=False, positions=False, softcap=None):
    """The gradients of a loss of both results over a mesh, traced for GPU; the launches in it."""
    mesh = gpu_targets.h100_mesh()
    struct = lambda spec, shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    lengths, heads = (time, time + halo, time + halo), (HEADS, KV_HEADS, KV_HEADS)
    arrays = [struct(BY_HEAD, (2, t, n, width), dtype) for t, n in zip(lengths, heads, strict=True)]
    numbers = [struct(BY_ROW, (2, length), jnp.int32) for length in (time, time + halo)]
    options = {"window": window, "softcap": softcap, "backend": "triton"} | ({} if positions else {"offset": halo})

    def local(q, k, v, sinks, *numbers):
        given = {"segment_ids": numbers} if documents else {}
        given |= {"positions": numbers} if positions else {}
        out, log_sum_exp = attention(q, k, v, sinks=sinks, **options, **given)
        return jax.lax.psum(jnp.sum(out.astype(jnp.float32) ** 2) + log_sum_exp.sum(), ("data", "tensor"))

    def loss(arrays, numbers):
        specs = (BY_HEAD,) * 3 + (PartitionSpec("tensor"),) + (BY_ROW,) * 2
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=True)
        return mapped(*arrays, *numbers)

    launches, call = [], triton_gpu._call

    def recorded(launch):
        launches.append(launch)
        return call(launch)

    arrays.append(struct(PartitionSpec("tensor"), (HEADS,), jnp.float32))
    with pytest.MonkeyPatch.context() as patch, compiling_for("gpu"):
        patch.setattr(triton_gpu, "_call", recorded)
        return jax.jit(jax.value_and_grad(loss)).trace(arrays, numbers), launches


@pytest.mark.parametrize(("case", "width"), [(case, (64, 128)[i % 2]) for i, case in enumerate(CASES)])
def test_compiles_for_h100(case, width, record_property):
    """XLA's compiler takes the gradient of a loss, on a mesh that cuts batch and heads."""
    started = time.perf_counter()
    traced, launches = trace(width, jnp.bfloat16, **CASES[case])
    lowered = traced.lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=gpu_targets.COMPILER_OPTIONS)
    seconds = time.perf_counter() - started
    assert [launch.kernel for launch in launches] == ["forward", "backward_queries", "backward_keys"]
    assert compiled.as_text().count('custom_call_target="triton_kernel_call"') == 3
    q = math.prod(launches[0].inputs[0].shape)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / q
    assert temporaries < 20, "more than a few arrays like q"
    row = {"compiled by XLA for 8 H100": f"attention {case}", "K": width}
    row["temporaries, bytes a number of q"] = f"{temporaries:.1f}"
    record_property("row", row | {"seconds": f"{seconds:.1f}"})


def describe(launch) -> tuple:
    """What the compiled kernel depends on."""
    types = [f"*{SHORT[array.dtype.name]}" for array in launch.inputs] + ["i32"] * len(launch.scalars)
    types += [f"*{SHORT[np.dtype(dtype).name]}" for _, dtype in launch.outputs]
    return launch.kernel, tuple(types), tuple(launch.constants.items()), launch.warps, launch.stages


@functools.cache
def compile_once(kernel, types, constants, warps, stages, capability) -> Resources:
    from lcx_kernels.attention import triton_kernels

    return compile_kernel(getattr(triton_kernels, kernel), list(types), dict(constants), warps, capability, stages)


def traffic(launch) -> float:
    """Bytes that the programs of a launch load and store, if none were found in caches, over the least possible.

    A program reads its own block once, and the other side's once for each pair of blocks that may see each other. Of a
    causal mask half of these; read here from the shapes alone, for launches without arrays of segments or indices.
    """
    sizes = launch.constants
    q, k, v = launch.inputs[:3]
    batch, time, heads, width = q.shape
    keys, window, by_keys = k.shape[1], sizes["WINDOW"], launch.kernel == "backward_keys"
    offset = launch.scalars[2]
    block, other = (sizes["KEYS"], sizes["QUERIES"]) if by_keys else (sizes["QUERIES"], sizes["KEYS"])
    first = np.arange(0, keys if by_keys else time, block)
    last = np.minimum(first + block, keys if by_keys else time) - 1
    if by_keys:
        low = np.maximum(first - offset, 0)
        high = np.full_like(first, time - 1) if window is None else np.minimum(last + window - 1 - offset, time - 1)
    else:
        low = np.zeros_like(first) if window is None else np.maximum(first + offset - window + 1, 0)
        high = np.minimum(last + offset, keys - 1)
    met = int((high // other - low // other + 1).clip(0).sum()) * other
    own = sum(math.prod(array.shape) for array in ((k, v) if by_keys else (q,)))
    own += 0 if launch.kernel == "forward" or by_keys else math.prod(q.shape)
    pair = 2 * width  # k and v, or q and d_out, of a token and head
    moved = own + batch * heads * met * pair + sum(math.prod(shape) for shape, _ in launch.outputs)
    inputs = launch.inputs[:3] + (launch.inputs[8:9] if launch.kernel != "forward" else ())
    least = sum(math.prod(array.shape) for array in inputs) + sum(math.prod(shape) for shape, _ in launch.outputs)
    return moved / least


def report(launches, case, width, dtype, record_property, capability=90):
    """A row for each kernel; none may spill or take more shared memory than there is."""
    for launch in launches:
        needs = compile_once(*describe(launch), capability)
        sizes = launch.constants
        row = {"kernel": f"attention {launch.kernel}", "case": case, "K": width, "dtype": jnp.dtype(dtype).name}
        row |= {"sm": capability, "block": f"{sizes['QUERIES']} x {sizes['KEYS']}", "warps": launch.warps}
        row |= {"registers": needs.registers, "spills": needs.spills, "shared memory": needs.shared_memory}
        row["programs per 2 SMs"] = f"{launch.programs / (gpu_targets.MULTIPROCESSORS / 2):.1f}"
        plain = not sizes["HAS_INDEX"]
        row["loads over least, without caches"] = f"{traffic(launch):.1f}" if plain else ""
        record_property("row", row | {"seconds": f"{needs.seconds:.1f}"})
        assert needs.spills == 0, launch.kernel
        assert needs.shared_memory <= gpu_targets.SHARED_MEMORY, launch.kernel


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("case", ["causal", "halo, documents"])
def test_needs_of_each_kernel(case, width, record_property):
    _, launches = trace(width, jnp.bfloat16, **CASES[case])
    report(launches, case, width, jnp.bfloat16, record_property)


@pytest.mark.parametrize(
    ("width", "dtype", "options"),
    [
        (64, jnp.float32, {"window": 700, "documents": True}),
        (128, jnp.float32, {"softcap": 30.0}),
        (64, jnp.bfloat16, {"softcap": 30.0}),
        (96, jnp.bfloat16, {"softcap": 30.0}),
    ],
)
def test_needs_of_other_calls(width, dtype, options, record_property):
    _, launches = trace(width, dtype, 4096, **options)
    report(launches, ", ".join(options), width, dtype, record_property)


def test_sizes_of_one_compile():
    """jax-triton makes constants of scalars that are 1."""
    traced, _ = trace(16, jnp.float32, 1)
    traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=gpu_targets.COMPILER_OPTIONS)
