"""The selective scan's Pallas kernels, compiled for TPUs by their own compiler, on meshes cut along three axes."""

import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.backends import compiling_for
from lcx_kernels.selective_scan import selective_scan, selective_scan_summary
from tests.aot.pallas_calls import bytes_around, pallas_calls
from tests.aot.topologies import TPUS, tpu_mesh

pytestmark = pytest.mark.aot

CHANNELS = {"130M": 1536, "1.4B": 4096, "2.8B": 5120}  # of Mamba's published sizes
LENGTHS = {"4K": 4096, "32K": 32768, "256K": 262144}
VMEM = 16 * 2**20  # what a v5e lets a kernel use by default
TRAFFIC = {"selective_scan_forward": 1.2, "selective_scan_backward": 1.6}  # over the least possible, at most

BY_TOKEN, BY_CHANNEL = PartitionSpec("data", "seq", "tensor"), PartitionSpec("tensor")
SHARED, STATE = PartitionSpec("data", "seq"), PartitionSpec(("data", "seq"), "tensor")  # a state on each device
SPECS = {"x": BY_TOKEN, "dt": BY_TOKEN, "z": BY_TOKEN, "A": BY_CHANNEL, "D": BY_CHANNEL, "dt_bias": BY_CHANNEL}
SPECS |= {"B": SHARED, "C": SHARED, "reset": SHARED, "initial_state": STATE}


def shapes(batch, length, channels, state=16, dtype=jnp.bfloat16, seqs=1):
    """Everything on, as Mamba calls it: tokens in ``dtype``, weights and states in float32."""
    struct, tokens = jax.ShapeDtypeStruct, (batch, length)
    arguments = {name: struct((*tokens, channels), dtype) for name in ("x", "dt", "z")}
    arguments |= {name: struct((*tokens, state), dtype) for name in ("B", "C")}
    arguments |= {"A": struct((channels, state), jnp.float32), "reset": struct(tokens, bool)}
    arguments |= {name: struct((channels,), jnp.float32) for name in ("D", "dt_bias")}
    return arguments | {"initial_state": struct((batch * seqs, channels, state), jnp.float32)}


def forward(arguments):
    return selective_scan(**arguments, dt_softplus=True, backend="pallas_tpu")


def gradients(function, arguments, cotangents):
    rest = {"reset": arguments["reset"]} if "reset" in arguments else {}
    differentiable = {name: value for name, value in arguments.items() if name != "reset"}
    return jax.vjp(lambda some: function(some | rest), differentiable)[1](cotangents)[0]


def on_mesh(mesh, arguments):
    """The scan within a shard_map over all axes, its arguments with their shardings, and cotangents.

    Every device scans from a state of its own: carrying it from device to device is not a kernel's work.
    """
    specs = {name: SPECS[name] for name in arguments}
    mapped = jax.shard_map(forward, mesh=mesh, in_specs=(specs,), out_specs=(BY_TOKEN, STATE), check_vma=True)
    placed = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, SPECS[name]))
        for name, array in arguments.items()
    }
    return mapped, placed, (placed["x"], placed["initial_state"])


def compile_for_tpu(function, *arguments):
    """The compiled program and the seconds that it took."""
    with compiling_for("tpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def vmem_reported(compiled, name):
    """Bytes of VMEM that the compiler gave to a kernel, as the compiled program says."""
    call = next(line for line in compiled.as_text().splitlines() if f"%{name}" in line and " custom-call(" in line)
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', call)
    return int(used[1]) if used else 0


def nbytes(tree):
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(tree))


@functools.cache
def traffic_on_a_device(channels, length):
    """By kernel: the call, and its traffic over the least: every input read once, outputs and borders written once."""
    arguments = shapes(1, length, channels)
    cotangents = arguments["x"], arguments["initial_state"]
    with compiling_for("tpu"):
        forward_call, backward_call = pallas_calls(functools.partial(gradients, forward), arguments, cotangents)
        around = bytes_around(forward, arguments)
        around_both = bytes_around(functools.partial(gradients, forward), arguments, cotangents)
    borders = next(block.array_aval for block in forward_call.blocks if "borders" in block.origin)
    least_forward = nbytes((arguments, cotangents, borders))  # outputs are as large as their cotangents
    differentiable = {name: array for name, array in arguments.items() if name != "reset"}
    least_backward = least_forward + nbytes(differentiable)
    return {
        forward_call.name: (forward_call, (forward_call.traffic() + around) / least_forward),
        backward_call.name: (backward_call, (backward_call.traffic() + around_both - around) / least_backward),
    }


CASES = [(chip, size, length) for chip in TPUS for size in CHANNELS for length in LENGTHS]


@pytest.mark.parametrize(("chip", "size", "length"), CASES)
def test_published_sizes(chip, size, length, record_property):
    """Forward and backward: they compile, blocks fit in VMEM, all cores have work, and traffic is near the least."""
    mesh = tpu_mesh(chip)
    cores = mesh.devices.flat[0].num_cores
    arguments = shapes(2, LENGTHS[length], CHANNELS[size], seqs=2)
    mapped, placed, cotangents = on_mesh(mesh, arguments)
    alone, alone_seconds = compile_for_tpu(mapped, placed)
    both, seconds = compile_for_tpu(functools.partial(gradients, mapped), placed, cotangents)
    local = CHANNELS[size] // 2, LENGTHS[length] // 2
    for name, (call, ratio) in traffic_on_a_device(*local).items():
        reported = vmem_reported(both, name)
        row = {"kernel": name, "chip": chip, "size": size, "T": length, "passed": False}
        row["compile s"] = f"{alone_seconds if name.endswith('forward') else seconds:.1f}"
        row["VMEM MiB of blocks"] = f"{call.vmem_bytes() / 2**20:.1f}"
        row["VMEM MiB reported"] = f"{reported / 2**20:.1f}"
        row["programs per core"] = f"{call.parallel_programs / cores:g}"
        row["traffic over least"] = f"{ratio:.3f}"
        record_property("row", row)
        assert 1 <= ratio <= TRAFFIC[name]
        assert max(call.vmem_bytes(), reported) <= VMEM
        assert reported >= 0.9 * call.vmem_bytes(), "the count of blocks, or what the compiler says, is wrong"
        assert call.parallel_programs % cores == 0, "a core has less to do than the others"
        row["passed"] = True
    per_token = local[0] * local[1] * 16 * 4
    assert alone.memory_analysis().temp_size_in_bytes < per_token / 100
    assert both.memory_analysis().temp_size_in_bytes < per_token / 10


def test_a_shared_weight_has_one_gradient():
    """Rates that do not vary over data and seq are given as they are: their gradient is summed over both."""
    mapped, placed, cotangents = on_mesh(tpu_mesh("v5e"), shapes(2, 512, 256, seqs=2))
    compiled, _ = compile_for_tpu(functools.partial(gradients, mapped), placed, cotangents)
    assert re.search(r"all-reduce(-start)?\(", compiled.as_text())


RAGGED = {
    "one token": shapes(2, 2, 1536, seqs=2),
    "few tokens": shapes(2, 2 * 130, 1536, seqs=2),
    "ragged time and channels": shapes(2, 2 * 1111, 2 * 770, seqs=2),
    "few channels and states": shapes(2, 2 * 1024, 2 * 12, state=4, seqs=2),
    "float32": shapes(2, 2 * 1000, 2 * 768, dtype=jnp.float32, seqs=2),
    "many states": shapes(2, 2 * 1024, 2 * 1024, state=128, seqs=2),
}


@pytest.mark.parametrize("case", RAGGED)
def test_odd_shapes(case):
    mapped, placed, cotangents = on_mesh(tpu_mesh("v5e"), RAGGED[case])
    compile_for_tpu(functools.partial(gradients, mapped), placed, cotangents)


def test_summary():
    """The final state alone has no output by token, forward and backward."""
    everything = shapes(1, 4096, 2048)
    arguments = {name: everything[name] for name in ("x", "dt", "A", "B", "dt_bias", "reset")}

    def final_state(arguments):
        return selective_scan_summary(**arguments, dt_softplus=True, backend="pallas_tpu").state

    state = everything["initial_state"]
    device = tpu_mesh("v5e").devices.flat[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = functools.partial(jax.tree.map, lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding))
    compile_for_tpu(functools.partial(gradients, final_state), place(arguments), place(state))
    with compiling_for("tpu"):
        forward_call, backward_call = pallas_calls(functools.partial(gradients, final_state), arguments, state)
    tokens = nbytes(arguments["x"])
    assert 2 * tokens < forward_call.traffic() < 2.3 * tokens  # x and dt are read
    assert 4 * tokens < backward_call.traffic() < 4.6 * tokens  # and their gradients written


def test_traffic_is_counted_block_by_block():
    """Of a call whose copies can be counted by hand: 2 by 3 by 4 blocks of 8 by 128, the last one of each row short."""
    blocks = {
        "each once": pl.BlockSpec((None, 8, 128), lambda b, c, t: (b, t, c)),
        "per column": pl.BlockSpec((None, 8, 128), lambda b, c, t: (b, t, 0)),
        "per row": pl.BlockSpec((None, 8, 128), lambda b, c, t: (b, 0, 0)),
    }
    shape = jax.ShapeDtypeStruct((2, 30, 300), jnp.float32)

    def copy(inputs):
        return pl.pallas_call(
            lambda inputs, out, _: out.__setitem__(..., inputs["each once"][...]),
            grid=(2, 3, 4),
            in_specs=[blocks],
            out_specs=blocks["each once"],
            out_shape=shape,
            scratch_shapes=[pltpu.VMEM((3, 100), jnp.bfloat16)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        )(inputs)

    (call,) = pallas_calls(copy, dict.fromkeys(blocks, shape))
    whole = 2 * 32 * 384 * 4  # in memory, rows come by 8 and lanes by 128
    assert call.traffic() == 2 * whole + 2 * 3 * 32 * 128 * 4 + 2 * 8 * 128 * 4
    assert call.vmem_bytes() == 2 * 4 * 8 * 128 * 4 + 16 * 128 * 2
    assert call.parallel_programs == 6


def test_more_elements_than_int32_counts():
    """The compiler takes arrays of more than 2^31 elements, and all blocks lie inside of them.

    Index maps, in int32, return a block's place along each axis, never an offset into the array; the counter of traffic
    asks them for every step of the grid and refuses a block that lies outside.
    """
    mapped, placed, cotangents = on_mesh(tpu_mesh("v5p"), shapes(16, LENGTHS["256K"], CHANNELS["2.8B"], seqs=2))
    compile_for_tpu(functools.partial(gradients, mapped), placed, cotangents)
    local = shapes(8, LENGTHS["256K"] // 2, CHANNELS["2.8B"] // 2)
    assert math.prod(local["x"].shape) > 2**31
    with compiling_for("tpu"):
        calls = pallas_calls(functools.partial(gradients, forward), local, (local["x"], local["initial_state"]))
    assert all(call.traffic() > 3 * 2 * 2**31 for call in calls)
