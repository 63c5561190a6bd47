"""Whether a fused convolution would pay: what XLA's own moves, compiled for TPUs, over the least possible."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcx_kernels.backends import compiling_for
from lcx_kernels.causal_conv import causal_conv
from tests.aot.topologies import TPUS, tpu_mesh

pytestmark = pytest.mark.aot

TIME, CHANNELS, WIDTH = 32_768, 4096, 4  # of Mamba 1.4B


def forward(x, weight, bias, tail, lookback):
    """As Mamba calls it, with what follows at once."""
    y, tail = causal_conv(x, weight, bias, tail=tail, lookback=lookback)
    return jax.nn.silu(y), tail


def both(x, weight, bias, tail, lookback, dy):
    (y, last), pull = jax.vjp(lambda *arrays: forward(*arrays, lookback), x, weight, bias, tail)
    return y, pull((dy, jnp.zeros_like(last)))


@pytest.mark.parametrize("chip", TPUS)
@pytest.mark.parametrize("function, arrays, most", [(forward, 2, 1.05), (both, 5, 2.5)], ids=["forward", "both"])
def test_traffic(chip, function, arrays, most, record_property):
    """`arrays`: [batch, time, channels] of bfloat16 that must be read or written once: x, y; x, y, dy, x again, dx."""
    whole = NamedSharding(tpu_mesh(chip), PartitionSpec())
    struct = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
    tokens = struct(jnp.bfloat16, 1, TIME, CHANNELS)
    arguments = [tokens, struct(jnp.bfloat16, CHANNELS, WIDTH), struct(jnp.bfloat16, CHANNELS)]
    arguments += [struct(jnp.bfloat16, 1, WIDTH - 1, CHANNELS), struct(jnp.int32, 1, TIME)]
    arguments += [tokens] if function is both else []
    begin = time.perf_counter()
    with compiling_for("tpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    traffic = compiled.cost_analysis()["bytes accessed"] / (arrays * 2 * TIME * CHANNELS)
    row = {"chip": chip, "convolution by XLA": function.__name__, "compile seconds": f"{seconds:.1f}"}
    record_property("row", row | {"traffic over least": f"{traffic:.2f}"})
    assert traffic < most
