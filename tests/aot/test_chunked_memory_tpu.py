"""The chunked memory's Pallas kernels, compiled for TPUs by their own compiler, on meshes cut along three axes."""

import functools
import math
import re
import time
from typing import NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.backends import compiling_for
from lcx_kernels.chunked_memory import SegmentState, chunked_memory
from tests.aot.pallas_calls import bytes_around, pallas_calls
from tests.aot.topologies import tpu_mesh

pytestmark = pytest.mark.aot

VMEM = 16 * 2**20  # what the least of the chips lets a kernel use by default
TRAFFIC = {"forward": 1.2, "backward": 1.6}  # over the least possible, at most


class Kind(NamedTuple):
    """Heads as on one device."""

    heads: tuple[int, int, int]  # of q, k and v
    widths: tuple[int, int]  # K and V
    chunk_size: int
    decay: bool = False
    static: tuple = ()
    time: int = 4096
    dtype: jnp.dtype = jnp.bfloat16
    channels: bool = False  # a decay a key channel

    @property
    def options(self) -> dict:
        return dict(self.static) | {"chunk_size": self.chunk_size, "backend": "pallas_tpu"}

    @property
    def segmented(self) -> bool:
        return self.options.get("read") == "exclusive"


DELTA_RULE = (("update", "delta_rule"),)
NORMALIZED = (("normalize", True),)
INFINI = (("normalize", True), ("read", "exclusive"))
INFINI_DELTA = (*INFINI, ("update", "segment_delta"))
KINDS = {
    # 2.7B of Mamba-2: 80 heads, of which a device has half, 128 states, one group.
    "ssd 128 64, chunk 256": Kind((1, 1, 40), (128, 64), 256, decay=True),
    "ssd 128 64, chunk 128": Kind((1, 1, 40), (128, 64), 128, decay=True),
    "ssd 64 64, chunk 64": Kind((1, 1, 16), (64, 64), 64, decay=True),
    "linear 64 64, chunk 64": Kind((8, 8, 8), (64, 64), 64, static=NORMALIZED),
    "linear 128 128, chunk 256": Kind((8, 8, 8), (128, 128), 256, decay=True),
    "gated 64 64, chunk 64": Kind((8, 8, 8), (64, 64), 64, decay=True, channels=True),
    "gated 64 64, chunk 128": Kind((8, 8, 8), (64, 64), 128, decay=True, channels=True),
    "gated 128 128, chunk 128": Kind((8, 8, 8), (128, 128), 128, decay=True, channels=True),
    "delta rule 128 128, chunk 64": Kind((8, 8, 8), (128, 128), 64, static=DELTA_RULE),
    "delta rule 64 64, chunk 128": Kind((8, 8, 8), (64, 64), 128, decay=True, static=DELTA_RULE),
    "infini 128 128, segment 2048": Kind((8, 8, 8), (128, 128), 2048, static=INFINI),
    "infini delta 128 128, segment 2048": Kind((8, 2, 2), (128, 128), 2048, static=INFINI_DELTA),
    "infini delta 64 64, segment 256": Kind((8, 4, 4), (64, 64), 256, static=INFINI_DELTA),
}
# Compiled, not counted.
ODD = {
    "ssd float32": Kind((2, 2, 8), (128, 64), 256, decay=True, static=NORMALIZED, time=1000, dtype=jnp.float32),
    "delta rule float32": Kind((2, 2, 4), (128, 128), 100, decay=True, static=DELTA_RULE, time=130, dtype=jnp.float32),
    "gated float32": Kind((2, 2, 2), (128, 64), 100, decay=True, channels=True, time=130, dtype=jnp.float32),
    "odd widths and heads": Kind((3, 3, 3), (40, 72), 60, decay=True, time=70),
    # As summaries have them: values beside a unit matrix or two.
    "delta rule, wide values": Kind((2, 2, 2), (128, 256), 64, decay=True, static=DELTA_RULE, time=256),
    "infini delta, wide values": Kind((2, 2, 2), (128, 384), 2048, static=INFINI_DELTA, time=2048),
    "infini float32": Kind((6, 2, 2), (64, 128), 1000, static=INFINI_DELTA, time=2222, dtype=jnp.float32),
}
TOKENS, STATE = PartitionSpec("data", "seq", "tensor"), PartitionSpec(("data", "seq"), "tensor")
MARKS = PartitionSpec("data", "seq")


def shapes(kind: Kind, cut: int = 1) -> dict:
    """Arguments of one row a device, over ``cut`` devices along each axis of a mesh."""
    struct, (of_q, of_k, of_v), (K, V) = jax.ShapeDtypeStruct, kind.heads, kind.widths
    tokens, heads, rows = (cut, kind.time * cut), max(of_k, of_v) * cut, cut * cut
    arguments = {
        "q": struct((*tokens, of_q * cut, K), kind.dtype),
        "k": struct((*tokens, of_k * cut, K), kind.dtype),
        "v": struct((*tokens, of_v * cut, V), kind.dtype),
        "reset": struct(tokens, bool),
    }
    if kind.decay:
        arguments["log_decay"] = struct((*tokens, heads, *[K] * kind.channels), jnp.float32)
    if kind.options.get("update") == "delta_rule":
        arguments["beta"] = struct((*tokens, heads), jnp.float32)
    matrix, vector = struct((rows, heads, K, V), jnp.float32), struct((rows, heads, K), jnp.float32)
    if kind.segmented:
        arguments["positions"] = struct(tokens, jnp.int32)
        arguments["initial_state"] = SegmentState(matrix, vector, matrix, vector)
    else:
        arguments["initial_state"] = (matrix, vector) if kind.options.get("normalize") else matrix
    return arguments


def forward(kind, arguments):
    return chunked_memory(**arguments, **kind.options)


def gradients(function, arguments, cotangents):
    fixed = {name: arguments[name] for name in ("reset", "positions") if name in arguments}
    differentiable = {name: value for name, value in arguments.items() if name not in fixed}
    return jax.vjp(lambda some: function(some | fixed), differentiable)[1](cotangents)[0]


def cotangents_of(kind, arguments):
    """Shapes of the outputs: out and the final state, which is as the initial one."""
    v = arguments["v"]
    heads = v.shape[2] * max(kind.heads) // kind.heads[2]
    return jax.ShapeDtypeStruct((*v.shape[:2], heads, v.shape[3]), v.dtype), arguments["initial_state"]


def on_mesh(mesh, kind):
    """The memory within a shard_map over all axes, its arguments with their shardings, and cotangents.

    Every device starts from a state of its own: carrying it from device to device is not a kernel's work.
    """
    arguments = shapes(kind, cut=2)
    spec = {"reset": MARKS, "positions": MARKS, "initial_state": STATE}
    specs = {name: spec.get(name, TOKENS) for name in arguments}
    function = functools.partial(forward, kind)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=(TOKENS, STATE), check_vma=True)

    def place(spec, tree):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree)

    out, state = cotangents_of(kind, arguments)
    placed = {name: place(specs[name], array) for name, array in arguments.items()}
    return mapped, placed, (place(TOKENS, out), place(STATE, state))


def compile_for_tpu(function, *arguments):
    """The compiled program and the seconds that it took."""
    with compiling_for("tpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def vmem_reported(compiled, name):
    """Bytes of VMEM that the compiler gave to a kernel, values that spill included, as the compiled program says."""
    calls = (line for line in compiled.as_text().splitlines() if " custom-call(" in line)
    call = next(line for line in calls if re.search(rf"%\w*{name}", line))
    return int(re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', call)[1])


def nbytes(tree):
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(tree))


def live_bytes_around(function, *arguments):
    """`bytes_around` of what results depend on: no compiler keeps the rest."""
    closed = jax.make_jaxpr(function)(*arguments)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return bytes_around(jax.extend.core.jaxpr_as_fun(closed.replace(jaxpr=live)), *jax.tree.leaves(arguments))


@functools.cache
def traffic_on_a_device(kind):
    """By kernel: the call, and its traffic over the least: every input read once, outputs and borders written once.

    Also what is done outside of the kernels, as if nothing of it were fused.
    """
    arguments = shapes(kind)
    cotangents = cotangents_of(kind, arguments)
    function = functools.partial(forward, kind)
    with compiling_for("tpu"):
        calls = pallas_calls(functools.partial(gradients, function), arguments, cotangents)
        around = live_bytes_around(function, arguments)
        around_both = live_bytes_around(functools.partial(gradients, function), arguments, cotangents)
    borders = [block.array_aval for block in calls[0].blocks if "borders" in block.origin]
    least_forward = nbytes((arguments, cotangents, borders))  # outputs are as large as their cotangents
    differentiable = {name: array for name, array in arguments.items() if name not in ("reset", "positions")}
    least_backward = least_forward + nbytes(differentiable)
    return {
        "forward": (calls[0], (calls[0].traffic() + around) / least_forward),
        "backward": (calls[1], (calls[1].traffic() + around_both - around) / least_backward),
    }


CASES = [(chip, name) for chip in ("v5p", "v6e") for name in KINDS]


@pytest.mark.parametrize(("chip", "name"), CASES)
def test_kinds(chip, name, record_property):
    """Forward and backward: they compile, blocks fit in VMEM, all cores have work, and traffic is near the least."""
    kind, mesh = KINDS[name], tpu_mesh(chip)
    cores = mesh.devices.flat[0].num_cores
    mapped, placed, cotangents = on_mesh(mesh, kind)
    compiled, seconds = compile_for_tpu(functools.partial(gradients, mapped), placed, cotangents)
    for direction, (call, ratio) in traffic_on_a_device(kind).items():
        reported = vmem_reported(compiled, call.name)
        row = {"memory": f"{name}, {direction}", "chip": chip, "T": kind.time, "passed": False}
        row["compile s, both"] = f"{seconds:.1f}"
        row["VMEM MiB of blocks"] = f"{call.vmem_bytes() / 2**20:.1f}"
        row["VMEM MiB reported"] = f"{reported / 2**20:.1f}"
        row["programs per core"] = f"{call.parallel_programs / cores:g}"
        row["traffic over least"] = f"{ratio:.3f}"
        record_property("row", row)
        assert max(call.vmem_bytes(), reported) <= VMEM
        assert reported >= 0.9 * call.vmem_bytes(), "the count of blocks, or what the compiler says, is wrong"
        assert call.parallel_programs % cores == 0, "a core has less to do than the others"
        assert 1 <= ratio <= TRAFFIC[direction]
        row["passed"] = True


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name):
    mapped, placed, cotangents = on_mesh(tpu_mesh("v5p"), ODD[name])
    compile_for_tpu(functools.partial(gradients, mapped), placed, cotangents)
