"""The `triton` selective scan, compiled for GPUs that are not here: by XLA for H100s, by Triton down to machine code.

What it computes is tested in tests/parity, in Triton's interpreter, as is that traffic is counted rightly.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.backends import compiling_for
from lcx_kernels.selective_scan import selective_scan, selective_scan_summary, triton_gpu, triton_plan
from tests import triton_traffic
from tests.aot import gpu_targets
from tests.aot.gpu_targets import Resources, compile_kernel

AXES = ("data", "seq", "tensor")
PER_CHANNEL, SHARED, CHANNELS = PartitionSpec(*AXES), PartitionSpec("data", "seq"), PartitionSpec("tensor")
SPECS = {"x": PER_CHANNEL, "dt": PER_CHANNEL, "z": PER_CHANNEL, "B": SHARED, "C": SHARED, "reset": SHARED}
SPECS |= {"A": CHANNELS, "D": CHANNELS, "dt_bias": CHANNELS, "initial_state": PartitionSpec("data", "tensor")}
# Mamba-130M, 1.4B and 2.8B; rows are few where they are long, so that time is cut and is not.
SIZES = {
    "130m-4k": (128, 4096, 1536, jnp.bfloat16),
    "130m-256k": (2, 262144, 1536, jnp.bfloat16),
    "1.4b-4k": (16, 4096, 4096, jnp.bfloat16),
    "1.4b-32k-float32": (2, 32768, 4096, jnp.float32),
    "2.8b-32k": (16, 32768, 5120, jnp.bfloat16),
    "2.8b-256k": (2, 262144, 5120, jnp.bfloat16),
}
SHORT = {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int8": "i8"}


def local_loss(arrays, chunk_size=None):
    """A shard's scan from the state of its own summary: both calls, forward and backward."""
    of_map = {name: arrays[name] for name in ("x", "dt", "A", "B", "dt_bias", "reset")}
    options = {"dt_softplus": True, "backend": "triton", "chunk_size": chunk_size}
    summary = selective_scan_summary(**of_map, **options)
    initial = summary.decay(arrays["A"]) * arrays["initial_state"] + summary.state
    y, final = selective_scan(**arrays | {"initial_state": initial}, **options)
    return jax.lax.psum(jnp.sum(y.astype(jnp.float32) ** 2) + final.sum(), AXES)


def trace(batch: int, time: int, channels: int, dtype, state: int = 16, chunk_size: int | None = None):
    """The loss and its gradients over a mesh, traced for GPU; the launches in it."""
    mesh = gpu_targets.h100_mesh()
    per_token, shared, wide = (batch, time, channels), (batch, time, state), jnp.promote_types(dtype, jnp.float32)
    shapes = {"x": per_token, "dt": per_token, "z": per_token, "B": shared, "C": shared}
    arrays = {name: (shape, dtype) for name, shape in shapes.items()}
    shapes = {"A": (channels, state), "D": (channels,), "dt_bias": (channels,)}
    shapes["initial_state"] = (batch, channels, state)
    arrays |= {name: (shape, wide) for name, shape in shapes.items()}
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, SPECS[name]))
        for name, (shape, dtype) in arrays.items()
    }
    reset = jax.ShapeDtypeStruct((batch, time), bool, sharding=NamedSharding(mesh, SHARED))

    def loss(arrays, reset):
        local = functools.partial(local_loss, chunk_size=chunk_size)
        whole = jax.shard_map(local, mesh=mesh, in_specs=(SPECS,), out_specs=PartitionSpec(), check_vma=True)
        return whole(arrays | {"reset": reset})

    launches, call = [], triton_gpu._call

    def recorded(launch):
        launches.append(launch)
        return call(launch)

    with pytest.MonkeyPatch.context() as patch, compiling_for("gpu"):
        patch.setattr(triton_gpu, "_call", recorded)
        return jax.jit(jax.value_and_grad(loss)).trace(arrays, reset), launches


def compile_for_gpu(traced):
    return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=gpu_targets.COMPILER_OPTIONS)


def describe(launch) -> tuple:
    """What the compiled kernel depends on."""
    types = [f"*{SHORT[array.dtype.name]}" for array in launch.inputs] + ["i32"] * len(launch.scalars)
    types += [f"*{SHORT[np.dtype(dtype).name]}" for _, dtype in launch.outputs]
    return launch.kernel, tuple(types), tuple(launch.constants.items()), launch.warps


@functools.cache
def compile_once(kernel, types, constants, warps, capability) -> Resources:
    return compile_kernel(kernel, list(types), dict(constants), warps, capability)


@pytest.mark.aot
@pytest.mark.parametrize("size", SIZES)
def test_compiles_for_h100(size, record_property):
    """XLA's compiler takes the gradient of a loss, on a mesh that cuts batch, time and channels."""
    started = time.perf_counter()
    traced, launches = trace(*SIZES[size])
    compiled = compile_for_gpu(traced)
    seconds = time.perf_counter() - started
    assert compiled.as_text().count('custom_call_target="triton_kernel_call"') == len(launches)
    kernels = {launch.kernel for launch in launches}
    assert kernels >= {"forward", "backward"}
    batch, tokens, channels, dtype = SIZES[size]
    plan = triton_plan.make_plan(batch // 2, tokens // 2, channels // 2, 16, dtype == jnp.float64, None)
    cut = plan.segments > 1 or plan.back.segments > 1
    assert ("combine" in kernels) == cut
    # No array of [time, channels, state], nor a widened copy of what came in bfloat16.
    local = batch // 2 * (tokens // 2) * (channels // 2)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < local * 32
    row = {"compiled by XLA for 8 H100": size, "launches": len(launches), "time is cut": cut}
    row |= {"temporaries, bytes a token and channel": f"{temporaries / local:.1f}", "seconds": f"{seconds:.1f}"}
    record_property("row", row)


@pytest.mark.aot
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_sizes_of_one_compile(chunk_size):
    """jax-triton makes constants of scalars that are 1."""
    compile_for_gpu(trace(2, 2, 2, jnp.float32, chunk_size=chunk_size)[0])


def counted_passes(batch: int, time: int, channels: int, dtype, state: int = 16) -> dict:
    """By (pass, whether it has y): the passes of a device's shard, the summary's among them."""
    found = {}
    for with_y in (True, False):
        inputs = triton_traffic.abstract_inputs(batch // 2, time // 2, channels // 2, state, dtype, with_y)
        wide = inputs.initial_state.dtype == jnp.float64
        plan = triton_plan.make_plan(*inputs.sizes, wide, None)
        found |= {(name, with_y): each for name, each in triton_traffic.passes(inputs, plan).items()}
    return found


def report(launches, passes: dict, size: str, capability: int, record_property) -> None:
    """A row for each kernel; none may spill, convert layouts or take more shared memory than there is.

    Traffic is over the least that the kernel's whole pass must move; that of a pass is the sum of its kernels' and of
    the sums outside, and may be as much as the issue's limits.
    """
    from lcx_kernels.selective_scan import triton_kernels

    planned = {(*describe(each), each.scalars, each.programs) for one in passes.values() for each in one.launches}
    traced = {(*describe(each), each.scalars, each.programs) for each in launches}
    assert traced <= planned, "what is counted is not what is launched"
    rows = {}
    for (name, with_y), one in passes.items():
        if name == "forward":  # without states kept: not a part of a gradient
            continue
        for launch in one.launches:
            rows.setdefault(describe(launch), (launch, name, with_y, triton_traffic.moved(launch) / one.least))
    for described, (launch, name, with_y, traffic) in rows.items():
        needs = compile_once(getattr(triton_kernels, launch.kernel), *described[1:], capability)
        kind = launch.kernel + (" (summary)" if launch.constants.get("SUMMARY") else "")
        kind += " (back)" if launch.constants.get("BACK") else ""
        kind += "" if with_y else " without y"
        row = {"kernel": kind, "size": size, "sm": capability, "registers": needs.registers, "spills": needs.spills}
        row |= {"shared memory": needs.shared_memory, "warps": launch.warps}
        row["programs per 2 SMs"] = f"{launch.programs / (gpu_targets.MULTIPROCESSORS / 2):.1f}"
        row["MiB moved"] = f"{triton_traffic.moved(launch) / 2**20:.0f}"
        row["traffic over least"] = f"{traffic:.2f} of {passes[name, with_y].ratio:.2f}"
        record_property("row", row | {"seconds": f"{needs.seconds:.1f}"})
        assert needs.conversions == 0, kind
        assert needs.spills == 0 or capability == 80, kind  # on an A100 the backward pass may spill a few bytes
        assert needs.shared_memory <= gpu_targets.SHARED_MEMORY, kind


def check_traffic(passes: dict) -> None:
    cut = ", cut" if any(launch.kernel == "combine" for launch in passes["forward", True].launches) else ""
    for name in ("forward", "keeping", "backward"):
        limit = triton_traffic.LIMITS[name.replace("keeping", "forward") + cut]
        assert 1 <= passes[name, True].ratio <= limit, name


@pytest.mark.aot
@pytest.mark.parametrize("size", SIZES)
def test_traffic(size):
    """Of every published size, on a device's shard."""
    check_traffic(counted_passes(*SIZES[size]))


@pytest.mark.aot
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("size", ["130m-4k", "130m-256k", "1.4b-32k-float32"])
def test_needs_of_each_kernel(size, capability, record_property):
    _, launches = trace(*SIZES[size])
    report(launches, counted_passes(*SIZES[size]), size, capability, record_property)


@pytest.mark.aot
@pytest.mark.parametrize(("state", "dtype"), [(1, "bfloat16"), (64, "bfloat16"), (128, "float32"), (16, "float64")])
def test_needs_of_other_states(state, dtype, record_property):
    with jax.enable_x64(dtype == "float64"):
        _, launches = trace(2, 8192, 1536, jnp.dtype(dtype), state)
        passes = counted_passes(2, 8192, 1536, jnp.dtype(dtype), state)
    report(launches, passes, f"state {state}, {dtype}", 90, record_property)
