"""The segmented memory: every backend against sums over the segments of each document, values and all gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lcx_kernels.backends import BackendUnavailable
from lcx_kernels.chunked_memory import SegmentState, segment_memory

BACKENDS = ["reference", "xla"]
UPDATES = ["linear", "segment_delta"]
BATCH, HEADS, KV_HEADS, K, V = 2, 4, 2, 3, 5


def draw(time: int, seed: int = 0) -> dict:
    """Arguments in float64; keys, queries and normalisers are positive, as feature maps make them."""
    rng = np.random.default_rng(seed)
    positive = lambda *shape: rng.uniform(0.2, 2.0, shape)  # noqa: E731
    matrix, vector = (BATCH, KV_HEADS, K, V), (BATCH, KV_HEADS, K)
    return {
        "q": positive(BATCH, time, HEADS, K),
        "k": positive(BATCH, time, KV_HEADS, K),
        "v": rng.normal(size=(BATCH, time, KV_HEADS, V)),
        "initial_state": SegmentState(
            rng.normal(size=matrix), positive(*vector), rng.normal(size=matrix), positive(*vector)
        ),
    }


def rows_of(*documents: tuple[int, int]) -> np.ndarray:
    """Positions of one row: (first position, tokens) of each document."""
    return np.concatenate([first + np.arange(count) for first, count in documents])


def by_segments(q, k, v, initial_state, *, positions, segment_length, update):
    """The definition, a document and a segment at a time, in NumPy."""
    outs, states = np.empty((*q.shape[:3], V)), []
    for row, place in enumerate(positions):
        state = [array[row] for array in initial_state]
        borders = np.flatnonzero((place[1:] % segment_length == 0) | (place[1:] == 0)) + 1
        for start, stop in itertools.pairwise([0, *borders.tolist(), len(place)]):
            if place[start] == 0:
                state = [np.zeros_like(array) for array in state]
            elif place[start] % segment_length == 0:
                state = [state[0] + state[2], state[1] + state[3], np.zeros_like(state[2]), np.zeros_like(state[3])]
            memory, normalizer, open_memory, open_normalizer = state
            keys, values = k[row, start:stop], v[row, start:stop]
            queries = q[row, start:stop].reshape(stop - start, KV_HEADS, HEADS // KV_HEADS, K)
            found = np.einsum("tngk,nkv->tngv", queries, memory)
            found /= (np.einsum("tngk,nk->tng", queries, normalizer) + 1e-6)[..., None]
            outs[row, start:stop] = found.reshape(stop - start, HEADS, V)
            if update == "segment_delta":
                held = np.einsum("tnk,nkv->tnv", keys, memory)
                values = values - held / (np.einsum("tnk,nk->tn", keys, normalizer) + 1e-6)[..., None]
            written = np.einsum("tnk,tnv->nkv", keys, values)
            state = [memory, normalizer, open_memory + written, open_normalizer + keys.sum(0)]
        states.append(state)
    return outs, SegmentState(*(np.stack(arrays) for arrays in zip(*states, strict=True)))


PACKINGS = {
    "one_document": [((0, 24),), ((0, 24),)],
    "going_on": [((6, 24),), ((8, 24),)],
    "packed": [((3, 5), (0, 1), (0, 18)), ((0, 12), (0, 12))],
    "many": [((7, 4), (0, 2), (0, 2), (0, 1), (0, 15)), ((4, 8), (0, 8), (0, 8))],
    "one_token": [((11, 1),), ((4, 1),)],
}


@functools.cache
def compiled(segment_length: int, update: str, backend: str):
    """(arguments, positions, cotangents) to results and gradients; compiled for each length of time."""
    settings = dict(segment_length=segment_length, update=update, backend=backend)

    @jax.jit
    def pull(arguments, positions, cotangents):
        run = lambda arguments: segment_memory(  # noqa: E731
            **arguments, positions=positions, reset=positions == 0, **settings
        )
        results, pullback = jax.vjp(run, arguments)
        return results, pullback(cotangents)[0]

    return pull


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("segment_length", [1, 4, 7, 32])
@pytest.mark.parametrize("packing", PACKINGS)
def test_values_and_gradients(packing, segment_length, update):
    """Values against the definition; gradients against those that JAX finds of the token-by-token backend."""
    positions = np.stack([rows_of(*documents) for documents in PACKINGS[packing]]).astype(np.int32)
    with jax.enable_x64(True):
        arguments = draw(positions.shape[1])
        expected = by_segments(**arguments, positions=positions, segment_length=segment_length, update=update)
        cotangents = jax.tree.map(lambda x: np.random.default_rng(1).normal(size=x.shape), expected)
        found = {
            backend: compiled(segment_length, update, backend)(arguments, positions, cotangents) for backend in BACKENDS
        }
    for results, _ in found.values():
        assert_close(results, expected)
    assert_close(found["xla"][1], found["reference"][1])


def assert_close(found, expected) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * max(1, np.abs(other).max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update, factors", [("linear", [0, 1, 1, 1, 1]), ("segment_delta", [0, 1, 0.5, 0.5, 0.5])])
def test_the_same_pair_in_every_segment(update, factors, backend):
    """One key and value stored n times: linear reads v whatever n; segment_delta v once, v/2 ever after, since its
    second segment adds nothing along the key while the normaliser grows."""
    segment_length = 3
    time = segment_length * len(factors)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        key, value = rng.uniform(0.5, 1.5, (K,)), rng.normal(size=(V,))
        first = np.arange(time) % segment_length == 0  # the other tokens write nothing
        k = np.where(first[None, :, None, None], key, 0)
        out, _ = segment_memory(
            np.broadcast_to(key, (1, time, 1, K)),
            k,
            np.broadcast_to(value, (1, time, 1, V)),
            positions=np.arange(time, dtype=np.int32)[None],
            segment_length=segment_length,
            update=update,
            backend=backend,
        )
    expected = np.repeat(factors, segment_length)[:, None] * value
    np.testing.assert_allclose(out[0, :, 0], expected, atol=3e-6)


@pytest.mark.parametrize("update", UPDATES)
def test_half_precision_outside_is_float32_inside(update):
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), (BATCH, 64))
    arguments = draw(64) | {"initial_state": None}
    half = {name: jnp.asarray(arguments[name], jnp.bfloat16) for name in ("q", "k", "v")}
    out, state = segment_memory(**half, positions=positions, segment_length=8, update=update)
    full = {name: array.astype(jnp.float32) for name, array in half.items()}
    expected, _ = segment_memory(**full, positions=positions, segment_length=8, update=update)
    assert {leaf.dtype for leaf in jax.tree.leaves((out, state))} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(out, expected)


def test_empty_memory_reads_zero_exactly_and_has_finite_gradients():
    arguments = draw(6) | {"initial_state": None}
    arguments = {name: None if array is None else jnp.asarray(array, jnp.float32) for name, array in arguments.items()}
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (BATCH, 6))
    tiny = arguments | {"q": jnp.full_like(arguments["q"], 1e-30)}

    def total(q):
        return segment_memory(**(tiny | {"q": q}), positions=positions, segment_length=8)[0].sum()

    value, gradient = jax.value_and_grad(total)(tiny["q"])
    assert value == 0 and np.all(np.asarray(gradient) == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_shards(backend):
    """Batch and heads may be cut over devices, forward and backward."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (BATCH, 9))
    inputs = [jnp.asarray(draw(9)[name], jnp.float32) for name in ("q", "k", "v")]

    def local(q, k, v, positions):
        return segment_memory(q, k, v, positions=positions, segment_length=4, backend=backend)[0]

    heads = PartitionSpec("data", None, "tensor", None)
    specs = (heads, heads, heads, PartitionSpec("data", None))
    cut = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=True)
    loss = lambda function: lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v, positions)))  # noqa: E731
    found = jax.jit(jax.grad(loss(cut), argnums=(0, 1, 2)))(*inputs)
    expected = jax.grad(loss(local), argnums=(0, 1, 2))(*inputs)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_mistakes_are_named():
    positions = np.zeros((BATCH, 4), np.int32)
    good = draw(4) | dict(positions=positions, segment_length=2)
    bad = {
        "k: shape": {"k": good["k"][:, :3]},
        "v: shape": {"v": good["v"][:, :, :1]},
        "positions": {"positions": positions.astype(np.float32)},
        "segment_length: 0": {"segment_length": 0},
        "update: unknown name 'delta'": {"update": "delta"},
        "initial_state.normalizer": {"initial_state": good["initial_state"]._replace(normalizer=good["v"])},
        "expected a divisor": {"q": good["q"][:, :, :3]},
        "reset": {"reset": positions},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            segment_memory(**(good | change))
    with pytest.raises(BackendUnavailable, match="triton"):
        segment_memory(**good, backend="triton")
