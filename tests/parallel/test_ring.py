"""Attention round a ring of shards: the dense result, with equal work for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lcx.laws.measure import deviation
from lcx.parallel import ring
from lcx.parallel.kernels import attend
from lcx.parallel.ring import collect, deal, ring_attention
from lcx.parallel.sequence import time_over
from lcx_kernels.attention import attention

HEADS, KV_HEADS, BATCH = 4, 2, 2


def seq_mesh(shards: int) -> jax.sharding.Mesh:
    return jax.make_mesh((shards,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])


def over_shards(function, shards: int, whole: int = 0):
    """`function` with time, axis 1 of its arguments, cut over the shards; the last `whole` arguments are entire."""

    def local(*arrays):
        cut, entire = arrays[: len(arrays) - whole], arrays[len(arrays) - whole :]
        with time_over("seq"):
            return function(*cut, *(jax.lax.pcast(array, "seq", to="varying") for array in entire))

    def run(*arrays):
        specs = tuple(PartitionSpec(*([None, "seq"] * (i < len(arrays) - whole))) for i in range(len(arrays)))
        return jax.shard_map(local, mesh=seq_mesh(shards), in_specs=specs, out_specs=PartitionSpec(None, "seq"))(
            *arrays
        )

    return run


def draw(time: int) -> tuple:
    """(q, k, v, documents): rows of several documents; one of them longer than three shards of eight."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=(BATCH, time, *shape))  # noqa: E731
    starts = random.random((BATCH, time)) < 0.1
    starts[0] = False
    return normal(HEADS, 8), normal(KV_HEADS, 8), normal(KV_HEADS, 6), np.cumsum(starts, axis=1, dtype=np.int32)


@functools.cache
def dense(time: int) -> dict:
    return pulled(lambda q, k, v, ids: attention(q, k, v, segment_ids=ids, backend="reference"), time)


def pulled(function, time: int) -> dict:
    """Both results and all gradients, with cotangents for both."""
    q, k, v, documents = draw(time)
    random = np.random.default_rng(1)
    cotangents = random.normal(size=(BATCH, time, HEADS, 6)), random.normal(size=(BATCH, time, HEADS))

    @jax.jit
    def pull(q, k, v, cotangents):
        results, pullback = jax.vjp(lambda q, k, v: function(q, k, v, documents), q, k, v)
        return results, pullback(cotangents)

    (out, log_sum_exp), gradients = pull(q, k, v, cotangents)
    return {"out": out, "log_sum_exp": log_sum_exp, "gradients": dict(zip("qkv", gradients, strict=True))}


@pytest.mark.parametrize("shards, time", [(1, 8), (2, 8), (3, 12), (8, 48), (3, 9), (4, 12)])
def test_the_ring_is_dense_attention(shards, time):
    """Also where shards have an odd number of tokens."""
    with jax.enable_x64(True):
        found = pulled(over_shards(functools.partial(ring_attention, axis="seq"), shards), time)
        difference = deviation(found, dense(time))
    assert difference.value < 1e-9, difference


def loss_and_gradients(function, dtype) -> tuple:
    """Of q, k, v and sinks."""
    sinks = np.linspace(-1, 1, HEADS, dtype=np.float32)

    def loss(*arrays):
        return jnp.sum(jnp.sin(function(*arrays).astype(jnp.float32)))

    arguments = *(array.astype(dtype) for array in draw(32)[:3]), sinks
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arguments)


@functools.cache
def dense_with_sinks(dtype) -> tuple:
    documents = draw(32)[3]

    def whole(q, k, v, sinks):
        return attention(q, k, v, segment_ids=documents, sinks=sinks, backend="reference")[0]

    return loss_and_gradients(whole, dtype)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_both_exchanges_with_sinks(exchange, dtype, tolerance):
    documents = draw(32)[3]

    def cut(q, k, v, sinks):
        local = lambda q, k, v, ids, sinks: attend(q, k, v, ids, sinks, exchange=exchange)  # noqa: E731
        return over_shards(local, 4, whole=1)(q, k, v, documents, sinks)

    found, expected = loss_and_gradients(cut, dtype), dense_with_sinks(dtype)
    difference = deviation({"all": found[1]}, {"all": expected[1]})
    assert difference.value < tolerance, difference
    assert abs(found[0] - expected[0]) < tolerance * abs(expected[0])


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 8])
def test_pieces_are_dealt_from_both_ends_and_collected(shards):
    pieces = np.arange(2.0 * shards)[None]

    def there_and_back(pieces):
        dealt = deal(pieces, axis="seq")
        return dealt, collect(dealt, axis="seq")

    dealt, back = jax.jit(over_shards(there_and_back, shards))(pieces)
    assert np.reshape(dealt, (shards, 2)).tolist() == [[shard, 2 * shards - 1 - shard] for shard in range(shards)]
    np.testing.assert_array_equal(back, pieces)


def pairs_computed(shards: int, time: int) -> float:
    """Pairs of a query and a key that a shard computes, in a row, counted from the calls of the program that runs.

    One program runs on all shards, without a branch, so that it is the busiest shard's count.
    """
    counted = []

    def count(q, k, v, *, causal=True, **_):
        queries, keys = q.shape[1], k.shape[1]
        counted.append(q.shape[0] * (queries * (queries + 1) / 2 if causal else queries * keys))
        return 0 * q, 0 * q[..., 0]  # not zeros: they vary over the shards

    def trace(attention):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "attention", attention)
            arrays = [jnp.zeros((1, time, 1, 2))] * 3 + [jnp.zeros((1, time), jnp.int32)]
            return jax.make_jaxpr(over_shards(functools.partial(ring_attention, axis="seq"), shards))(*arrays)

    program = str(trace(count))
    assert " cond[" not in program
    own, in_the_loop, at_the_end = counted
    return own + (shards - 2) * in_the_loop + at_the_end


def test_the_busiest_shard_has_its_share():
    time, shards = 4096, 8
    ideal = time * (time + 1) / 2 / shards
    assert pairs_computed(shards, time) == ideal
