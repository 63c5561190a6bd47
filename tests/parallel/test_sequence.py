"""What comes before a shard in time: on one device, and over shards of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lcx.parallel.sequence import gather, halo, last, pass_state, time_over


@pytest.mark.parametrize("time, width, tail", [(5, 2, [4, 5]), (5, 5, [1, 2, 3, 4, 5]), (2, 3, [0, 1, 2]), (2, 0, [])])
def test_without_a_past_the_tail_is_filled_with_zeros(time, width, tail):
    x = jnp.arange(1.0, time + 1)[None]
    extended, new_tail = halo(x, None, width)
    assert extended is x and new_tail.tolist() == [tail]


@pytest.mark.parametrize("time", [1, 2, 3, 5])
def test_the_past_stands_in_front_and_moves_on(time):
    x = jnp.arange(4.0, 4 + time)[None]
    extended, new_tail = halo(x, jnp.array([[1.0, 2.0, 3.0]]), 3)
    everything = [1.0, 2.0, 3.0, *range(4, 4 + time)]
    assert extended.tolist() == [everything] and new_tail.tolist() == [everything[-3:]]


def on_shards(function, *arrays, whole=(), out_specs, shards=8):
    """`function` of the arrays, those at the places in `whole` entire, the others cut along axis 1."""
    mesh = jax.make_mesh((shards,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])
    cut = PartitionSpec(None, "seq")
    specs = tuple(PartitionSpec() if place in whole else cut for place in range(len(arrays)))

    def local(*arrays):
        varying = [jax.lax.pcast(a, "seq", to="varying") if i in whole else a for i, a in enumerate(arrays)]
        with time_over("seq"):
            return function(*varying)

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs))(*arrays)


CUT, WHOLE = PartitionSpec(None, "seq"), PartitionSpec()


@pytest.mark.parametrize("width", [0, 1, 3, 4, 5, 9, 31, 32, 40])
@pytest.mark.parametrize("has_tail", [True, False])
def test_halo_over_shards_is_the_row_before_each(width, has_tail):
    """Any width, within the neighbour, over several shards, and beyond the first of them into the carried tail."""
    time, size = 32, 4
    tokens = np.arange(1.0, 2 * time + 1).reshape(2, time)
    tail = -np.arange(1.0, 2 * width + 1).reshape(2, width)
    row = np.concatenate([tail if has_tail else np.zeros_like(tail), tokens], axis=1)
    function = lambda x, tail: halo(x, tail if has_tail else None, width)  # noqa: E731
    extended, new_tail = on_shards(function, tokens, tail, whole={1}, out_specs=(CUT, WHOLE))
    expected = [row[:, start : start + width + size] for start in range(0, time, size)]
    np.testing.assert_array_equal(extended, np.concatenate(expected, axis=1))
    np.testing.assert_array_equal(new_tail, row[:, time:])


@pytest.mark.parametrize("width", [3, 9, 40])
def test_gradients_go_back_through_a_halo(width):
    """Each token and each slot of the tail gets what all the shards that saw it send back."""
    time, size = 32, 4
    weights = np.random.default_rng(0).normal(size=(8, width + size)).astype(np.float32)

    def loss(x, tail):
        def weighted(x, tail, weights):
            extended, new_tail = halo(x, tail, width)
            return extended * weights[:1], new_tail

        flat = weights.reshape(1, -1)
        extended, new_tail = on_shards(weighted, x, tail, flat, whole={1}, out_specs=(CUT, WHOLE))
        return extended.sum() + 2 * new_tail.sum()

    dx, dtail = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((1, time)), jnp.ones((1, width)))
    expected = np.zeros(width + time, np.float32)
    for shard in range(8):
        expected[shard * size : shard * size + width + size] += weights[shard]
    expected[time:] += 2
    np.testing.assert_allclose(np.concatenate([dtail[0], dx[0]]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("has_initial", [True, False])
def test_states_pass_in_the_order_of_time(shards, has_initial):
    """Affine maps do not commute, so that a wrong order shows; matrices of 2 x 2."""
    random = np.random.default_rng(0)
    matrices = random.normal(size=(1, 2 * shards, 2)).astype(np.float32)
    added, initial = random.normal(size=(2, 2)).astype(np.float32), np.float32([1.0, -2.0])
    added = np.repeat(added[:1], 1, 0)

    def states(matrices, initial):
        incoming = pass_state(
            lambda: (matrices[0], matrices[0, 0]),
            initial if has_initial else None,
            then=lambda early, late: (late[0] @ early[0], late[0] @ early[1] + late[1]),
            apply=lambda map, state: map[1] if state is None else map[0] @ state + map[1],
        )
        outgoing = matrices[0] @ incoming + matrices[0, 0]
        return incoming[None, :, None], last(outgoing)

    found, final = on_shards(states, matrices, initial, whole={1}, out_specs=(CUT, WHOLE), shards=shards)
    state = initial if has_initial else np.zeros(2, np.float32)
    for shard in range(shards):
        np.testing.assert_allclose(found[0, 2 * shard : 2 * shard + 2, 0], state, rtol=1e-4)
        matrix = matrices[0, 2 * shard : 2 * shard + 2]
        state = matrix @ state + matrix[0]
    np.testing.assert_allclose(final, state, rtol=1e-4)


def test_on_one_device_the_state_is_handed_over_without_a_summary():
    initial = jnp.ones(3)
    assert pass_state(None, initial, then=None, apply=None) is initial
    assert last(initial) is initial and gather(initial) is initial


def test_gather_has_all_tokens_in_order():
    tokens = np.arange(32.0).reshape(1, 32)
    function = functools.partial(lambda x: gather(x))
    found = on_shards(function, tokens, out_specs=CUT)
    np.testing.assert_array_equal(found.reshape(8, 32), np.repeat(tokens, 8, 0))
