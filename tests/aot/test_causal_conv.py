"""The depthwise convolution, compiled for chips that are not here: what a kernel of our own moves, and what XLA does.

Bytes are over the least possible: forward, x is read and y written; backward, x and dy are read and dx written.
"""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.backends import compiling_for
from lcx_kernels.causal_conv import causal_conv, triton_gpu
from tests import triton_traffic
from tests.aot import gpu_targets
from tests.aot.pallas_calls import pallas_calls
from tests.aot.topologies import TPUS, tpu_mesh

pytestmark = pytest.mark.aot

TIME, CHANNELS, WIDTH = 32_768, 4096, 4  # of a device; Mamba 1.4B's channels
WHOLE = TIME * CHANNELS * 2  # bytes of an array [batch, time, channels]
VMEM = 16 * 2**20
TOKENS, OF_CHANNEL = PartitionSpec("data", "seq", "tensor"), PartitionSpec("tensor")
SPECS = {"x": TOKENS, "tail": PartitionSpec("data", None, "tensor"), "weight": OF_CHANNEL, "bias": OF_CHANNEL}
SPECS["lookback"] = PartitionSpec("data", "seq")


def forward(arguments, backend):
    """As Mamba calls it; the next tail is another kernel's matter here."""
    return causal_conv(**arguments, silu=True, backend=backend)[0]


def backward(arguments, dy, backend):
    rest = {"lookback": arguments["lookback"]}
    arrays = {name: array for name, array in arguments.items() if name != "lookback"}
    return jax.vjp(lambda arrays: forward(arrays | rest, backend), arrays)[1](dy)[0]


def shapes(cuts: int):
    """Of all devices, where each of batch, time and channels is cut so often; bfloat16."""
    struct, (time, channels) = jax.ShapeDtypeStruct, (TIME * cuts, CHANNELS * cuts)
    arrays = {"x": (cuts, time, channels), "tail": (cuts, WIDTH - 1, channels), "weight": (channels, WIDTH)}
    arrays["bias"] = (channels,)
    found = {name: struct(shape, jnp.bfloat16) for name, shape in arrays.items()}
    return found | {"lookback": struct((cuts, time), jnp.int32)}


def compile_on(mesh, platform, backend, of, options=None):
    """The program of ``forward`` or ``backward`` on a mesh cut along its three axes, and the seconds it took."""
    arguments = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, SPECS[name]))
        for name, array in shapes(2).items()
    }
    mapped = jax.shard_map(
        functools.partial(forward, backend=backend), mesh=mesh, in_specs=(SPECS,), out_specs=TOKENS, check_vma=True
    )
    gradient = lambda arguments, dy: jax.vjp(  # noqa: E731
        lambda arrays: mapped(arrays | {"lookback": arguments["lookback"]}),
        {name: array for name, array in arguments.items() if name != "lookback"},
    )[1](dy)
    function, given = (mapped, (arguments,)) if of is forward else (gradient, (arguments, arguments["x"]))
    with compiling_for(platform):
        lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    return compiled, time.perf_counter() - start


# XLA's backward pass is not used on TPU: it is here for comparison.
MOST = {("xla", "forward"): 1.05, ("xla", "backward"): 2.0, ("pallas_tpu", "backward"): 1.1}


@pytest.mark.parametrize(
    ("chip", "backend", "of"),
    [(chip, *what) for what in MOST for chip in TPUS if what != ("xla", "backward") or chip == "v5e"],
)
def test_tpu(chip, backend, of, record_property):
    """What XLA's loops move is XLA's own count; a Pallas call counts nothing there, and is counted by its blocks."""
    function, arrays = (forward, 2) if of == "forward" else (backward, 3)
    compiled, seconds = compile_on(tpu_mesh(chip), "tpu", backend, function)
    arguments, vmem = shapes(1), 0
    moved = compiled.cost_analysis()["bytes accessed"]
    if backend == "pallas_tpu":
        with compiling_for("tpu"):
            (call,) = pallas_calls(functools.partial(backward, backend=backend), arguments, arguments["x"])
        moved, vmem = moved + call.traffic(), call.vmem_bytes()
        assert call.parallel_programs % tpu_mesh(chip).devices.flat[0].num_cores == 0
    row = {"convolution": f"{backend}, {of}", "chip": chip, "compile s": f"{seconds:.1f}"}
    row |= {"VMEM MiB of blocks": f"{vmem / 2**20:.1f}", "traffic over least": f"{moved / WHOLE / arrays:.2f}"}
    record_property("row", row)
    assert vmem <= VMEM
    assert 0.99 < moved / WHOLE / arrays <= MOST[backend, of]


RAGGED = {"odd": (3, 1111, 770, 4), "one chunk": (2, 40, 96, 2), "wide filter": (1, 300, 1536, 9)}


@pytest.mark.parametrize("case", RAGGED)
def test_odd_shapes_for_tpu(case):
    batch, length, channels, width = RAGGED[case]
    place = jax.sharding.SingleDeviceSharding(tpu_mesh("v5e").devices.flat[0])
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    arguments = {"x": struct((batch, length, channels), jnp.float32), "weight": struct((channels, width), jnp.float32)}

    def gradients(arguments, dy):
        run = lambda arguments: causal_conv(**arguments, backend="pallas_tpu")[0]  # noqa: E731
        return jax.vjp(run, arguments)[1](dy)

    with compiling_for("tpu"):
        jax.jit(gradients).trace(arguments, arguments["x"]).lower(lowering_platforms=("tpu",)).compile()


def bytes_of_fusions(text: str) -> int:
    """What the operations of a compiled program's entry for GPU read and write, whole operands and results."""
    items = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}
    entry = text[text.index("\nENTRY") :]

    def nbytes(shape):
        found = re.findall(r"(bf16|f32|s32|pred)\[([\d,]*)\]", shape)
        return sum(items[kind] * int(np.prod([int(n) for n in sizes.split(",") if n] or [1])) for kind, sizes in found)

    shapes = dict(re.findall(r"%([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\(", entry))
    total = 0
    for shape, operands in re.findall(r" = (\(.*?\)|\S+) fusion\((.*?)\)", entry):
        names = re.findall(r"%([\w.\-]+)", operands)
        total += nbytes(shape) + sum(nbytes(shapes.get(name, "")) for name in names)
    return total


@pytest.mark.parametrize("of", ["forward", "backward"])
def test_h100_by_xla(of, record_property):
    """What our kernels are compared with: XLA writes out the joined tokens, and backward what it shifts."""
    function, arrays = (forward, 2) if of == "forward" else (backward, 3)
    compiled, seconds = compile_on(gpu_targets.h100_mesh(), "gpu", "xla", function, gpu_targets.COMPILER_OPTIONS)
    traffic = bytes_of_fusions(compiled.as_text()) / WHOLE / arrays
    row = {"convolution": f"xla, {of}", "chip": "H100", "compile s": f"{seconds:.1f}"}
    record_property("row", row | {"traffic over least": f"{traffic:.2f}"})
    assert traffic > 1.5, "XLA does as well: a kernel no longer pays"


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("of", ["forward", "backward"])
def test_triton(of, capability, record_property):
    """XLA takes it for H100s on a mesh; Triton compiles it down to machine code, without spills."""
    mesh, launches, call = gpu_targets.h100_mesh(), [], triton_gpu._call
    from lcx_kernels.causal_conv import triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gpu, "_call", lambda launch: launches.append(launch) or call(launch))
        function = forward if of == "forward" else backward
        compile_on(mesh, "gpu", "triton", function, gpu_targets.COMPILER_OPTIONS)
    launch = next(launch for launch in launches if launch.kernel == of)
    short = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
    types = [f"*{short[array.dtype.name]}" for array in launch.inputs] + ["i32"] * len(launch.scalars)
    types += [f"*{short[np.dtype(dtype).name]}" for _, dtype in launch.outputs]
    kernel = getattr(triton_kernels, of)
    needs = gpu_targets.compile_kernel(kernel, types, launch.constants, launch.warps, capability)
    arrays = 2 if of == "forward" else 3
    moved = triton_traffic.moved_by_convolution(launch)
    if of == "backward":  # partial sums are read again
        moved += triton_traffic.size(triton_traffic.Abstract(*launch.outputs[2]))
    row = {"convolution": f"triton, {of}", "sm": capability, "registers": needs.registers, "spills": needs.spills}
    row |= {"shared memory": needs.shared_memory, "seconds": f"{needs.seconds:.1f}"}
    row["programs per 2 SMs"] = f"{launch.programs / (gpu_targets.MULTIPROCESSORS / 2):.1f}"
    record_property("row", row | {"traffic over least": f"{moved / WHOLE / arrays:.2f}"})
    assert needs.spills == needs.conversions == 0
    assert needs.shared_memory <= gpu_targets.SHARED_MEMORY
    assert 1 <= moved / WHOLE / arrays <= 1.2
