"""The `triton` chunked memory, compiled for GPUs that are not here: by XLA for H100s, by Triton down to machine code.

What it computes is tested in tests/parity, in Triton's interpreter.
"""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.backends import compiling_for
from lcx_kernels.chunked_memory import chunked_memory, triton_gpu
from tests.aot import gpu_targets
from tests.aot.gpu_targets import Resources, compile_kernel

AXES = ("data", "seq", "tensor")
ROWS, TOKENS = PartitionSpec("data"), PartitionSpec("data", "seq")
SHORT = {"bfloat16": "bf16", "float32": "fp32", "int8": "i8"}
INFINI = {"read": "exclusive", "normalize": True, "chunk_size": 2048}


class Size(NamedTuple):
    """A call over eight devices; q, k and v heads, a decay for each state."""

    batch: int
    time: int
    heads: tuple[int, int, int]
    widths: tuple[int, int]
    dtype: jnp.dtype = jnp.bfloat16
    decay: bool = True
    options: dict = {"chunk_size": 256}
    channels: bool = False  # a decay a key channel

    def shapes(self) -> dict:
        of_q, of_k, of_v = self.heads
        (K, V), tokens, states = self.widths, (self.batch, self.time), max(of_k, of_v)
        found = {"q": (*tokens, of_q, K), "k": (*tokens, of_k, K), "v": (*tokens, of_v, V)}
        found = {name: (shape, self.dtype) for name, shape in found.items()}
        if self.decay:
            found["log_decay"] = (*tokens, states, *[K] * self.channels), jnp.float32
        if self.options.get("update") == "delta_rule":
            found["beta"] = (*tokens, states), jnp.float32
        return found


SIZES = {
    "Mamba-2 2.7B, 8k": Size(2, 8192, (1, 1, 80), (128, 64)),
    "Mamba-2 2.7B, 128k": Size(2, 131072, (1, 1, 80), (128, 64)),
    "SSD 64 x 64, 8k": Size(2, 8192, (2, 2, 64), (64, 64)),
    "linear attention, normalised, 8k": Size(
        2, 8192, (32, 16, 16), (128, 128), decay=False, options={"chunk_size": 256, "normalize": True}
    ),
    "linear attention, float32, 8k": Size(2, 8192, (32, 32, 32), (128, 128), jnp.float32),
    "gated 64 x 64, 8k": Size(2, 8192, (32, 32, 32), (64, 64), channels=True),
    "gated 128 x 128, 8k": Size(2, 8192, (32, 32, 32), (128, 128), channels=True),
    "gated 64 x 64, float32, 8k": Size(2, 8192, (32, 32, 32), (64, 64), jnp.float32, channels=True),
    "gated 128 x 128, float32, 8k": Size(2, 8192, (32, 32, 32), (128, 128), jnp.float32, channels=True),
    "delta rule, 8k": Size(2, 8192, (32, 32, 32), (128, 128), options={"chunk_size": 64, "update": "delta_rule"}),
    "Infini, 64k": Size(2, 65536, (16, 16, 16), (128, 128), decay=False, options=INFINI),
    "Infini delta, 64k": Size(
        2, 65536, (32, 16, 16), (64, 128), decay=False, options=INFINI | {"update": "segment_delta"}
    ),
}


def local_loss(options, gradient, arrays):
    positions = jnp.arange(arrays["k"].shape[1])[None] + 0 * arrays["reset"].astype(jnp.int32)
    out, state = chunked_memory(**arrays, **options, positions=positions, backend="triton")
    if not gradient:
        return out, jax.tree.leaves(state)
    return jax.lax.psum(jnp.sum(out.astype(jnp.float32) ** 2) + sum(map(jnp.sum, jax.tree.leaves(state))), AXES)


def trace(size: Size, gradient: bool = True):
    """The loss and its gradients over a mesh, or a shard's call alone, traced for GPU; the launches in it."""
    mesh, shapes = gpu_targets.h100_mesh(), size.shapes()
    specs = {name: PartitionSpec(*AXES) if shape[2] > 2 else TOKENS for name, (shape, _) in shapes.items()}
    specs["reset"], shapes["reset"] = TOKENS, ((size.batch, size.time), bool)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, (shape, dtype) in shapes.items()
    }
    local = functools.partial(local_loss, size.options, gradient)

    def loss(floats, reset):
        whole = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=True)
        return whole(floats | {"reset": reset})

    launches, call = [], triton_gpu._call

    def recorded(launch):
        launches.append(launch)
        return call(launch)

    with pytest.MonkeyPatch.context() as patch, compiling_for("gpu"):
        patch.setattr(triton_gpu, "_call", recorded)
        if gradient:
            reset = arrays.pop("reset")
            return jax.jit(jax.value_and_grad(loss)).trace(arrays, reset), launches
        shards = {name: 2 if len(spec) == 3 else 1 for name, spec in specs.items()}
        of_shard = {
            name: jax.ShapeDtypeStruct(
                (size.batch // 2, size.time // 2, *(n // shards[name] for n in shape[2:3]), *shape[3:]), dtype
            )
            for name, (shape, dtype) in shapes.items()
        }
        return jax.eval_shape(local, of_shard), launches


def describe(launch) -> tuple:
    """What the compiled kernel depends on."""
    types = [f"*{SHORT[array.dtype.name]}" for array in launch.inputs] + ["i32"] * len(launch.scalars)
    types += [f"*{SHORT[np.dtype(dtype).name]}" for _, dtype in launch.outputs]
    return launch.kernel, tuple(types), tuple(launch.constants.items()), launch.warps


@functools.cache
def compile_once(kernel, types, constants, warps, capability) -> Resources:
    return compile_kernel(kernel, list(types), dict(constants), warps, capability)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["Mamba-2 2.7B, 128k", "gated 64 x 64, 8k", "delta rule, 8k", "Infini delta, 64k"])
def test_compiles_for_h100(name, record_property):
    """XLA's compiler takes the gradient of a loss, on a mesh that cuts batch, time and heads."""
    started = time.perf_counter()
    traced, launches = trace(SIZES[name])
    lowered = traced.lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=gpu_targets.COMPILER_OPTIONS)
    seconds = time.perf_counter() - started
    # The backward pass repeats some of the forward pass; here, where both are one program, XLA makes them one.
    assert 5 <= compiled.as_text().count('custom_call_target="triton_kernel_call"') <= len(launches)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    row = {"compiled by XLA for 8 H100": name, "launches": len(launches)}
    row |= {"temporaries over q, k, v and out": f"{temporaries / arrays_of_shard(SIZES[name]):.1f}"}
    record_property("row", row | {"seconds": f"{seconds:.1f}"})


def arrays_of_shard(size: Size) -> int:
    """Bytes of the tokens of a device: queries, keys, values and outputs, and decays a key channel."""
    (of_q, of_k, of_v), (K, V) = size.heads, size.widths
    many = lambda heads: heads // 2 if heads > 2 else heads  # noqa: E731
    numbers = (many(of_q) + many(of_k)) * K + (many(of_v) + many(max(size.heads))) * V
    decays = many(of_k) * K * 4 if size.channels else 0
    return size.batch // 2 * (size.time // 2) * (numbers * jnp.dtype(size.dtype).itemsize + decays)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, 90) for name in SIZES if "128k" not in name] + [("SSD 64 x 64, 8k", 80)],
)
def test_needs_of_each_kernel(name, capability, record_property):
    """A row for each kernel; none may spill on an H100 or take more shared memory than there is."""
    from lcx_kernels.chunked_memory import triton_kernels

    _, launches = trace(SIZES[name])
    for described, launch in {describe(launch): launch for launch in launches}.items():
        needs = compile_once(getattr(triton_kernels, launch.kernel), *described[1:], capability)
        row = {"kernel": launch.kernel + (" back" if launch.constants.get("BACK") else ""), "size": name}
        row |= {"sm": capability, "registers": needs.registers, "spills": needs.spills, "warps": launch.warps}
        row |= {"shared memory": needs.shared_memory, "chunk": launch.constants["C"]}
        row["programs per 2 SMs"] = f"{launch.programs / (gpu_targets.MULTIPROCESSORS / 2):.1f}"
        record_property("row", row | {"seconds": f"{needs.seconds:.1f}"})
        assert needs.spills == 0 or capability == 80, row
        assert needs.shared_memory <= gpu_targets.SHARED_MEMORY, row


def size_of(*arrays) -> int:
    return sum(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays)


def moved(launches) -> int:
    """Bytes, every array once a launch: programs that share a part of one run side by side, and find it in the L2."""
    total = 0
    for launch in launches:
        total += size_of(*{id(array): array for array in launch.inputs}.values())
        total += sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in launch.outputs)
    return total


def borders(launches) -> int:
    """Bytes of the states between chunks or tiles, and of their gradients: each written once by someone."""
    return sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for launch in launches
        if launch.kernel in ("carry", "channel_carry", "carry_delta", "segment_sums")
        for shape, dtype in launch.outputs[:1]
    )


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "forward_limit", "whole_limit"),
    [
        ("Mamba-2 2.7B, 8k", 2.4, 2.9),
        ("linear attention, normalised, 8k", 2.2, 3.0),
        ("gated 64 x 64, 8k", 2.6, 2.9),
        ("gated 128 x 128, 8k", 2.6, 2.9),
        ("delta rule, 8k", 2.9, 4.8),
        ("Infini, 64k", 1.1, 1.3),
        ("Infini delta, 64k", 1.4, 1.7),
    ],
)
def test_memory_traffic(name, forward_limit, whole_limit, record_property):
    """Over the least possible: inputs and outputs once in either direction, and states between chunks once."""
    size, found = SIZES[name], []
    for gradient in (False, True):
        _, launches = trace(size, gradient)
        tokens = arrays_of_shard(size)
        least = (3 * tokens if gradient else tokens) + borders(launches)
        found.append(moved(launches) / least)
    row = {"traffic over the least": name, "forward": f"{found[0]:.2f}", "forward and backward": f"{found[1]:.2f}"}
    record_property("row", row)
    assert found[0] <= forward_limit
    assert found[1] <= whole_limit
