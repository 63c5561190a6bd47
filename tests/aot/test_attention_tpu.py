"""`pallas_tpu` attention, which is JAX's splash attention, compiled for TPUs by their own compiler."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.attention import attention, pallas_tpu
from lcx_kernels.backends import compiling_for
from tests.aot.pallas_calls import pallas_calls
from tests.aot.test_selective_scan_tpu import compile_for_tpu
from tests.aot.topologies import tpu_mesh

pytestmark = pytest.mark.aot

BY_HEAD, BY_ROW, SINKS = PartitionSpec("data", None, "tensor"), PartitionSpec("data"), PartitionSpec("tensor")
HEADS, KV_HEADS = 16, 4  # of all devices: 8 and 2 on each
VMEM = 16 * 2**20
CASES = {
    "causal": {"time": 8192},
    "window 2048": {"time": 32768, "window": 2048},
    "halo, documents, ragged": {"time": 4000, "window": 2048, "halo": 2047, "documents": True},
}
KERNELS = ("fwd", "dq", "dkv")


def build(width, dtype, time, window=None, halo=0, documents=False, softcap=None):
    """Attention of a shard, its gradients, and the shapes of the whole arrays with how they are cut."""
    lengths, heads = (time, time + halo, time + halo), (HEADS, KV_HEADS, KV_HEADS)
    arrays = [(BY_HEAD, (2, t, n, width), dtype) for t, n in zip(lengths, heads, strict=True)]
    arrays += [(SINKS, (HEADS,), jnp.float32)]
    arrays += [(BY_ROW, (2, length), jnp.int32) for length in (time, time + halo)]

    def local(q, k, v, sinks, *numbers):
        given = {"segment_ids": numbers} if documents else {}
        return attention(
            q, k, v, sinks=sinks, window=window, offset=halo, softcap=softcap, backend="pallas_tpu", **given
        )

    return local, arrays


def both(function, *arrays):
    """The results, and the gradients of a loss of both."""
    results, pull = jax.vjp(lambda *some: function(*some, *arrays[4:]), *arrays[:4])
    return results, pull(results)


def on_a_device(arrays):
    """The shapes of a shard."""
    parts = {"data": 2, "tensor": 2, None: 1}
    return [
        jax.ShapeDtypeStruct(
            tuple(n // parts[name] for n, name in zip(shape, (*spec, *[None] * 4), strict=False)), dtype
        )
        for spec, shape, dtype in arrays
    ]


def vmem_reported(compiled, name):
    """Bytes of VMEM that the compiler gave to a kernel, as the compiled program says."""
    text = compiled.as_text()
    call = text[re.search(rf"%\w*{name}[.\d]* = [^\n]*custom-call\(", text).start() :]
    return int(re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', call)[1])


def copies(plan, by_keys):
    """How often the kernel copies an array of the other side (k and v; of `dkv`, q and d_out), on average.

    Its index maps go by which blocks see each other, which are known while tracing.
    """
    _, met = pallas_tpu._meetings(plan, by_keys)
    return met.sum() / (plan.time // plan.block_q if by_keys else plan.keys // plan.block_kv)


@pytest.mark.parametrize(("chip", "width"), [("v5p", 64), ("v6e", 128)])
@pytest.mark.parametrize("case", CASES)
def test_compiles(chip, case, width, record_property):
    """Forward and backward, within a shard_map over batch and heads."""
    mesh = tpu_mesh(chip)
    cores = mesh.devices.flat[0].num_cores
    local, arrays = build(width, jnp.bfloat16, **CASES[case])
    specs = tuple(spec for spec, _, _ in arrays)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(BY_HEAD, BY_HEAD), check_vma=True)
    placed = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for spec, s, d in arrays]
    compiled, seconds = compile_for_tpu(functools.partial(both, mapped), *placed)
    shapes = on_a_device(arrays)
    plans, make_info = [], pallas_tpu._mask_info
    with compiling_for("tpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "_mask_info", lambda plan, by: plans.append(plan) or make_info(plan, by))
        calls = pallas_calls(functools.partial(both, local), *shapes)
    plan = plans[0]
    assert [next(kind for kind in KERNELS if kind in call.name) for call in calls] == list(KERNELS)
    least = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes[:3])
    for call in calls:
        row = {"kernel": call.name.removeprefix("splash_"), "chip": chip, "case": case, "K": width}
        row["VMEM MiB of blocks"] = f"{call.vmem_bytes() / 2**20:.1f}"
        row["VMEM MiB reported"] = f"{vmem_reported(compiled, call.name) / 2**20:.1f}"
        row["programs per core"] = f"{call.parallel_programs / cores:g}"
        row["copies of the other side"] = f"{copies(plan, 'dkv' in call.name):.1f}"
        record_property("row", row | {"compile s": f"{seconds:.1f}"})
        assert max(call.vmem_bytes(), vmem_reported(compiled, call.name)) <= VMEM
        assert call.parallel_programs % cores == 0, "a core has less to do than the others"
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 20 * least, "log-sum-exps lie in memory 128 times each, but no scores do"


@pytest.mark.parametrize(
    ("width", "dtype", "options"),
    [(64, jnp.float32, {"documents": True}), (256, jnp.bfloat16, {"softcap": 30.0})],
)
def test_other_calls_compile(width, dtype, options):
    local, arrays = build(width, dtype, 1024, **options)
    mesh = tpu_mesh("v6e")
    specs = tuple(spec for spec, _, _ in arrays)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(BY_HEAD, BY_HEAD), check_vma=True)
    placed = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for spec, s, d in arrays]
    compile_for_tpu(functools.partial(both, mapped), *placed)
