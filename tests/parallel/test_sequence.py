"""What comes before a shard in time."""

import jax.numpy as jnp
import pytest

from lcx.parallel.sequence import halo


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
