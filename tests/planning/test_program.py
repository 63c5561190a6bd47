"""What is read off a compiled program, against programs whose work is known, and against text written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcx.planning.hlo import groups_of, read_program
from lcx.planning.work import Groups, count_work

MESH = {"data": 1, "fsdp": 2, "seq": 2, "tensor": 2}
LINE = """HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} KIND(%x), GROUPS
}
"""


def instruction(groups, kind="all-gather"):
    program = read_program(LINE.replace("KIND", kind).replace("GROUPS", groups))
    return program.computations[program.entry]["y"]


@pytest.mark.parametrize(
    "groups, expected, axes",
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}", [0, 4], ("fsdp",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", [0, 2, 4, 6], ("fsdp", "seq")),
        ("replica_groups=[4,2]<=[8], dimensions={0}", [0, 1], ("tensor",)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", [0, 2], ("seq",)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x={0}", [0, 1, 4, 5], ("fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, to_apply=%a", [0, 4], ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%a", [0, 1, 2, 3], ("seq", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2], ("seq",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1], ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(0,2,1)) {'a'}, x=1", [0, 4], ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([4,2]T(1,0)) {'a'}, x=1", [0, 1], ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}, x=1", [0, 2, 4, 6], ("fsdp", "seq")),
        ("replica_groups={}", list(range(8)), ("fsdp", "seq", "tensor")),
        ("something_else=5", [], ("unread",)),
    ],
)
def test_groups_in_all_their_notations(groups, expected, axes):
    one = instruction(groups)
    assert groups_of(one, 8) == ([expected] if expected else [])
    assert Groups(MESH).axes_of(one) == (axes, expected)


def test_a_permutes_axis_is_that_of_all_its_pairs():
    one = instruction("channel_id=1, source_target_pairs={{0,0},{1,3},{4,6}}, metadata={}", "collective-permute")
    assert Groups(MESH).axes_of(one) == (("seq",), [1, 3])


LAYERS, ROWS, WIDTH = 3, 16, 64


@pytest.fixture(scope="module")
def small():
    """The text of a compiled gradient of a scanned stack of products, sharded over rows; and what it should send."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4, 1, 1), tuple(MESH))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loss(weights, x):
        @jax.named_scope("mixer_mine")
        def layer(x, weight):
            return jnp.sin(x @ weight), None

        x, _ = jax.lax.scan(layer, x, weights)
        return jnp.sum(x)

    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=everywhere)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows)
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss), out_shardings=everywhere).lower(weights, x).compile().as_text()
    return count_work(read_program(text), {"data": 1, "fsdp": 4, "seq": 1, "tensor": 1}, {"mixer_mine": "mine"})


def test_a_loops_body_counts_as_often_as_it_runs(small):
    assert small.unknown_loops == 0 and set(small.kinds) <= {"mine", "stack", "optimizer"}
    weights = LAYERS * WIDTH * WIDTH * 4
    sent = {
        axes: sum(work.wire[kind, axes] for work in small.kinds.values() for kind, axes in work.wire)
        for axes in [("fsdp",)]
    }
    assert sent[("fsdp",)] == 2 * 3 / 4 * weights  # the gradients' sum over four: every device sends 2 (n - 1) / n
    # A sine forward, its derivative and a product backward, of each layer's activations.
    elements = LAYERS * ROWS // 4 * WIDTH
    assert 3 * elements <= small.kinds["mine"].vector <= 8 * elements
    # Activations, in and out, forward and backward, and weights and gradients: some tens of kilobytes.
    assert 4 * weights <= small.kinds["mine"].memory <= 12 * weights


def test_what_the_forward_loop_keeps(small):
    """The input of each sine and of each product, of a quarter of the rows."""
    kept = LAYERS * ROWS // 4 * WIDTH * 4
    assert small.activations in (kept, 2 * kept)


TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %s = f32[]{:T(128)} add(%a, %b)
}

%scatter (p: bf16[64,32]) -> bf16[16,32] {
  %p = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = bf16[16,32]{1,0:T(8,128)(2,1)} dynamic-slice(%sum), dynamic_slice_sizes={16,32}
}

ENTRY %main (x: bf16[64,32]) -> bf16[16,32] {
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %kernel = (bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%near), frontend_attributes={kernel_metadata={
"name": "mine"
}}, metadata={op_name="jit(step)/jvp()/mixer_mine/pallas_call"}
  %out = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%kernel), index=0
  ROOT %fusion = bf16[16,32]{1,0} fusion(%out), calls=%scatter, metadata={op_name="transpose(jvp())/mixer_mine/dot"}
}
"""


def test_how_a_tpu_program_is_written():
    """Attributes on several lines, memory on the chip, and a sum of which each device keeps its part."""
    count = count_work(read_program(TPU), {"data": 1, "fsdp": 4, "seq": 1, "tensor": 1}, {"mixer_mine": "mine"})
    whole = 64 * 32 * 2
    work = count.kinds["mine"]
    assert work.kernels == 1 and work.wire == {("reduce-scatter", ("fsdp",)): whole * 3 / 4}
    assert work.memory == whole + whole + whole / 4  # the kernel's result, the fusion's argument and result
    assert count.kinds["stack"].memory == whole  # read into the chip's own memory
