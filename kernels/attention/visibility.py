"""Which keys a query sees: the common form that the backends in plain JAX work on.

Causality and windows both reduce to an interval of key indices per query; segments must be equal besides. Where the
alignment of queries and keys is known while tracing, a ``Band`` says so, and a backend skips the rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcx_kernels.attention.arguments import Arguments, Static

# The log-sum-exp of a query that sees no key: finite, so that merging two such partial results gives no NaN.
NO_KEY_LOG_SUM_EXP = -1e30


class Queries(NamedTuple):
    """What is known of each query, int32 [batch or 1, time]; None where it does not restrict."""

    first: jax.Array | None  # the smallest key index that the query sees
    last: jax.Array | None  # the largest
    segment: jax.Array | None


class Keys(NamedTuple):
    """What is known of each key, int32 [batch or 1, keys]; None where it does not restrict."""

    index: jax.Array
    segment: jax.Array | None


class Band(NamedTuple):
    """What is known while tracing: query t sees only the slots offset + t - reach to offset + t of the keys.

    ``offset`` None: nothing is known. ``reach`` None: back to the first key.
    """

    offset: int | None = None
    reach: int | None = None


def sides(arguments: Arguments, static: Static) -> tuple[Queries, Keys]:
    """Return what is known of the queries and of the keys."""
    query_index, key_index = arguments.query_index, arguments.key_index
    if static.offset is not None:
        query_index = static.offset + jnp.arange(arguments.q.shape[1], dtype=jnp.int32)[None]
        key_index = jnp.arange(arguments.k.shape[1], dtype=jnp.int32)[None]
    first = None if static.window is None else query_index - (static.window - 1)
    last = query_index if static.causal else None
    return Queries(first, last, arguments.query_segment), Keys(key_index, arguments.key_segment)


def band(static: Static) -> Band:
    """Return what is known while tracing."""
    reach = None if static.window is None else static.window - 1
    return Band(static.offset if static.causal else None, reach)


def visible(queries: Queries, keys: Keys) -> jax.Array:
    """Return, as booleans, who sees whom; the arrays of the two sides must broadcast against each other."""
    mask = jnp.ones((), bool)
    if queries.first is not None:
        mask &= keys.index >= queries.first
    if queries.last is not None:
        mask &= keys.index <= queries.last
    if queries.segment is not None:
        mask &= keys.segment == queries.segment
    return mask
