"""`lcx verify` catches what it is there to catch: one bug in parallel code each, and the trials that find it."""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import pytest

from lcx.cli.certify import certify
from lcx.config import MESH_AXES, Config, default_config
from lcx.mixers import attention, convolution, infini, mamba, mamba2, sinks
from lcx.parallel import kernels, memory, ring, sequence
from lcx.parallel.mesh import make_mesh
from lcx.parallel.sharding import ambient_mesh, time_shards
from lcx.training import train_step

pytestmark = pytest.mark.mesh

HEADS = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
MIXERS = {
    "mamba": {"type": "mamba"},
    "mamba2": {"type": "mamba2", "head_dim": 8, "num_groups": 2, "conv_width": 2},
    "swa": HEADS | {"window": 64},
    "sinks": HEADS | {"window": 64, "sink_tokens": 2},
    "attention": HEADS | {"sink": "logit"},
    "gather": HEADS | {"exchange": "gather"},
    "infini": HEADS | {"type": "infini", "segment_length": 64},
    "delta": HEADS | {"type": "infini", "segment_length": 64, "update": "segment_delta"},
    "mlp": {"type": "mlp", "d_ff": 48},
}

STATE = "sharding: mesh and one device, from a state"
NONE = "sharding: mesh and one device, from none"
TRAINING = "sharding: training: loss and gradients"
NARROW = "sharding: training in float32"
CAUSALITY = "causality: later tokens changed, on the mesh"
ISOLATION = "isolation: other documents changed, on the mesh"
RUN = {TRAINING, NARROW}
ALL = {STATE, NONE, *RUN}


def config(pattern: str, sizes: dict) -> Config:
    """One layer of each mixer of the pattern."""
    values = default_config().to_dict()
    used = {name: dict(MIXERS[name]) for name in pattern.split()}
    values["model"] |= {"pattern": pattern, "mixers": used, "d_model": 32, "vocab_size": 64}
    values["train"] |= {"batch_size": 8, "sequence_length": 64}
    values["mesh"] = dict.fromkeys(("data", "fsdp", "seq", "tensor"), 1) | sizes
    return Config.from_dict(values)


def broken(pattern: str, sizes: dict) -> set[str]:
    """The trials of verify that do not hold."""
    tried = config(pattern, sizes)
    mesh = make_mesh(tried.mesh, jax.devices()[: math.prod(getattr(tried.mesh, axis) for axis in MESH_AXES)])
    certificate = certify(tried, mesh, lambda finding: None)
    assert all(finding["error"] is None for finding in certificate["laws"]), certificate["laws"]
    return {f"{finding['law']}: {finding['compared']}" for finding in certificate["laws"] if not finding["passed"]}


@dataclass(frozen=True)
class Bug:
    """What is put in the place of what, and which trials break on which pattern and mesh."""

    pattern: str
    places: tuple[tuple[object, str], ...]  # (module or class, name of the function)
    plant: Callable  # from the right function to the wrong one
    caught: set[str] = field(default_factory=set)
    mesh: dict = field(default_factory=lambda: {"data": 2, "seq": 4})


def on_shards(wrong: Callable) -> Callable:
    """The wrong function where time is cut, the right one where it is whole."""

    def plant(right: Callable) -> Callable:
        def either(*arguments, **options):
            return (right if sequence.time_axis() is None else wrong(right))(*arguments, **options)

        return either

    return plant


def index() -> jax.Array:
    return jax.lax.axis_index(sequence.time_axis())


def count() -> int:
    return jax.lax.axis_size(sequence.time_axis())


# Halo: (x, tail, width, axis) -> the tokens before the shard.


def off_by_one(right):
    def wrong(x, tail, width, axis):
        tail = None if tail is None else jnp.concatenate([tail[:, :1], tail], axis=1)
        return right(x, tail, width + 1, axis)[:, :-1]

    return wrong


def without_tail(right):
    return lambda x, tail, width, axis: right(x, None, width, axis)


def one_neighbour(right):
    def wrong(x, tail, width, axis):
        near = min(width, x.shape[1])
        found = right(x, tail, width, axis)
        seen = jnp.arange(width) >= width - near
        return jnp.where((seen | (index() == 0)).reshape(-1, *[1] * (x.ndim - 2)), found, 0)

    return wrong


def without_gradient(right):
    return lambda *arguments, **options: jax.lax.stop_gradient(right(*arguments, **options))


# State passing: (summarize, initial, then, apply) -> the state before the shard.


def backwards(right):
    return lambda summarize, initial, then, apply: right(summarize, initial, lambda a, b: then(b, a), apply)


def cut_initial_gradient(right):
    def wrong(summarize, initial, then, apply):
        return right(summarize, jax.lax.stop_gradient(initial), then, apply)

    return wrong


def neighbour_only(right):
    return lambda summarize, initial, then, apply: right(summarize, initial, lambda early, late: late, apply)


def everywhere_initial(right):
    return lambda summarize, initial, then, apply: initial


def keeps_resets_out(right):
    return lambda *arguments, reset, **options: right(*arguments, reset=jnp.zeros_like(reset), **options)


def summed_over_shards(right):
    return lambda tree: jax.tree.map(lambda array: jax.lax.psum(array, sequence.time_axis()), tree)


def without_a_sum(right):
    """The weights' gradient of the first shard alone."""

    def wrong(x, weight, bias, **options):
        mine = index() == 0
        weight, bias = (jnp.where(mine, array, jax.lax.stop_gradient(array)) for array in (weight, bias))
        return right(x, weight, bias, **options)

    return wrong


def leaky_taps(right):
    """Taps of a shard's first tokens that do not ask where their document starts."""

    def wrong(x, weight, bias, *, tail, lookback, **options):
        first = jnp.arange(x.shape[1]) < weight.shape[1] - 1
        return right(x, weight, bias, tail=tail, lookback=jnp.where(first, weight.shape[1], lookback), **options)

    return wrong


# Attention.


def wider_window(right):
    return lambda *arguments, window, **options: right(*arguments, window=window + 1, **options)


def local_documents(right):
    """Documents counted from 1 in each shard."""

    def wrong(lookback):
        shards = time_shards(lookback.shape[1])
        if ambient_mesh() is None or shards == 1:
            return right(lookback)
        pieces = jnp.split(lookback == 0, shards, axis=1)
        return jnp.concatenate([jnp.cumsum(piece, axis=1, dtype=jnp.int32) + 1 for piece in pieces], axis=1)

    return wrong


def sink_a_shard(right):
    def wrong(query, key, value, documents, sinks=None, **options):
        return right(query, key, value, documents, sinks + math.log(count()), **options)

    return wrong


def swapped_pieces(right):
    return lambda x, axis: jnp.roll(right(x, axis), x.shape[1] // 2, axis=1)


def swapped_documents(right):
    """Document numbers dealt out otherwise than the keys that they belong to."""
    return lambda x, axis: jnp.roll(right(x, axis), x.shape[1] // 2, axis=1) if x.ndim == 2 else right(x, axis)


def own_documents(right):
    """A hop's keys taken for keys of the document of this shard's tokens."""
    return lambda static, earlier, queries, kv: right(static, earlier, queries, (*kv[:2], queries[1]))


def mean_of_parts(right):
    return lambda out, lse, new_out, new_lse: ((out + new_out) / 2, jnp.logaddexp(lse, new_lse))


def later_shards_too(right):
    return lambda shard, hop: shard >= hop - 1


def last_hop_dropped(right):
    """The gradients of keys and values that the last hop brings are lost."""

    def wrong(static, attend, dq, kv, dkv):
        def lossy(dq, kv, dkv, hop):
            new_dq, new_dkv = attend(dq, kv, dkv, hop)
            is_last = hop == static.shards - 1
            return new_dq, jax.tree.map(lambda old, new: jnp.where(is_last, old, new), dkv, new_dkv)

        return right(static, lossy, dq, kv, dkv)

    return wrong


def gathered_without_gradient(right):
    return lambda tree: jax.lax.stop_gradient(right(tree))


def whole_is_a_part(right):
    """The backward pass of a part of the keys taken for that of all: weights by the part's own log-sum-exp."""

    def wrong(static, earlier, queries, kv):
        q, documents, _, *rest = queries
        (_, one), (_, other) = ring._meet(static, earlier, (q, documents), kv)
        return right(static, earlier, (q, documents, jnp.logaddexp(one, other), *rest), kv)

    return wrong


# The loss: weights of a batch -> what they are divided by.


def at_the_start(right):
    """The memory before the sequence on every shard."""
    return lambda k, v, initial, **how: initial


def normalizers_of_nothing(right):
    def wrong(*arguments, normalizers=None, **how):
        return right(*arguments, normalizers=jax.tree.map(jnp.zeros_like, normalizers), **how)

    return wrong


def positions_in_the_shard(right):
    def wrong(*arguments, positions, **how):
        local = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=jnp.int32), positions.shape)
        return right(*arguments, positions=jnp.minimum(positions, local), **how)

    return wrong


def mean_of_time_shards(right):
    """A mean of the means of the shards of time."""

    def wrong(weights):
        shards = time_shards(weights.shape[1])
        if shards == 1:
            return right(weights)
        pieces = weights.reshape(weights.shape[0], shards, -1)
        sums = jnp.maximum(jnp.sum(pieces, axis=(0, 2)), 1) * shards
        return jnp.repeat(sums, weights.shape[1] // shards)

    return wrong


def mean_of_row_shards(right):
    """A mean of the means of the shards of rows, one of which has no token that counts."""

    def wrong(weights):
        mesh = ambient_mesh()
        if mesh is None:
            return right(weights)
        shards = mesh.shape["data"]
        sums = jnp.maximum(jnp.sum(weights.reshape(shards, -1), axis=1), 1) * shards
        return jnp.repeat(sums, weights.shape[0] // shards)[:, None]

    return wrong


def cut_unrepeated(right):
    """Groups repeated as a whole where each should be beside itself."""

    def wrong(self, heads, groups):
        repeated = right(self, heads, groups)
        return jnp.tile(groups, (1, 1, repeated.shape[2] // groups.shape[2], 1))

    return wrong


BEFORE = ((sequence, "_before"),)
BUGS = {
    "a halo off by one": Bug("swa", BEFORE, off_by_one, ALL),
    "a convolution's halo off by one": Bug("mamba", BEFORE, off_by_one, ALL),
    "a halo without the carried tail": Bug("swa", BEFORE, without_tail, {STATE}),
    "a halo of one neighbour": Bug("swa", BEFORE, one_neighbour, RUN),
    "a halo without a gradient": Bug("swa", BEFORE, without_gradient, ALL),
    "a window too wide across shards": Bug("swa", ((attention, "attention"),), on_shards(wider_window), ALL),
    "document numbers of a shard": Bug("swa", ((attention, "documents"),), local_documents, ALL | {ISOLATION}),
    "sink tokens that stay behind": Bug(
        "sinks", ((sinks, "pass_state"),), on_shards(everywhere_initial), ALL | {ISOLATION}
    ),
    "a weight's gradient not summed": Bug("mamba", ((convolution, "causal_conv"),), on_shards(without_a_sum), ALL),
    "a tap into another document": Bug(
        "mamba", ((convolution, "causal_conv"),), on_shards(leaky_taps), ALL | {ISOLATION}
    ),
    "decays composed backwards": Bug("mamba", ((mamba, "pass_state"),), on_shards(backwards), ALL | {ISOLATION}),
    "a state of the neighbour alone": Bug(
        "mamba", ((mamba, "pass_state"),), on_shards(neighbour_only), ALL | {ISOLATION}
    ),
    "a state without a gradient": Bug("mamba", ((mamba, "pass_state"),), on_shards(without_gradient), ALL),
    "an incoming state without a gradient": Bug(
        "mamba", ((mamba, "pass_state"),), on_shards(cut_initial_gradient), {STATE}
    ),
    "a state carried across documents": Bug(
        "mamba", ((mamba, "selective_scan_summary"),), keeps_resets_out, ALL | {ISOLATION}
    ),
    "a final state summed over shards": Bug("mamba", ((mamba, "last"),), on_shards(summed_over_shards), ALL),
    "a memory that stays behind": Bug("mamba2", ((mamba2, "pass_memory"),), on_shards(at_the_start), ALL | {ISOLATION}),
    "a memory carried across documents": Bug(
        "mamba2", ((memory, "chunked_memory_summary"),), keeps_resets_out, ALL | {ISOLATION}
    ),
    "groups for other heads": Bug("mamba2", ((kernels.Shard, "groups_for"),), cut_unrepeated, ALL, {"tensor": 4}),
    "segments counted in a shard": Bug("infini", ((infini, "chunked_memory"),), on_shards(positions_in_the_shard), ALL),
    "normalisers of nothing": Bug("delta", ((memory, "chunked_memory_summary"),), normalizers_of_nothing, ALL),
    "a sink counted on every shard": Bug("attention", ((attention, "attend"),), on_shards(sink_a_shard), {NONE, *RUN}),
    "pieces dealt out swapped": Bug("attention", ((ring, "deal"),), swapped_pieces, {NONE, CAUSALITY, ISOLATION, *RUN}),
    "documents dealt out otherwise": Bug("attention", ((ring, "deal"),), swapped_documents, {NONE, ISOLATION, *RUN}),
    "documents forgotten on a hop": Bug("attention", ((ring, "_meet"),), own_documents, {NONE, ISOLATION, *RUN}),
    "documents forgotten on a hop back": Bug("attention", ((ring, "_pull"),), own_documents, {NONE, ISOLATION, *RUN}),
    "parts merged without weights": Bug("attention", ((ring, "_merge"),), mean_of_parts, {NONE, *RUN}),
    "keys of a later shard": Bug(
        "attention", ((ring, "comes_from_earlier"),), later_shards_too, {NONE, CAUSALITY, *RUN}
    ),
    "dK and dV of the last hop": Bug("attention", ((ring, "_travel_with_gradients"),), last_hop_dropped, {NONE, *RUN}),
    "a part's own log-sum-exp": Bug("attention", ((ring, "_pull"),), whole_is_a_part, {NONE, *RUN}),
    "gathered keys without a gradient": Bug(
        "gather", ((kernels, "gather"),), on_shards(gathered_without_gradient), {NONE, *RUN}
    ),
    "a loss averaged over shards of time": Bug("mlp", ((train_step, "total_weight"),), mean_of_time_shards, RUN),
    "a loss averaged over shards of rows": Bug("mlp", ((train_step, "total_weight"),), mean_of_row_shards, RUN),
}


@contextlib.contextmanager
def planted(bug: Bug):
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        for place, name in bug.places:
            patch.setattr(place, name, bug.plant(getattr(place, name)))
        yield
    jax.clear_caches()


# Of `.ci/run`; `make meshes` plants all.
FIRST = {
    "a halo off by one",
    "a weight's gradient not summed",
    "a state carried across documents",
    "dK and dV of the last hop",
    "a sink counted on every shard",
    "a loss averaged over shards of time",
    "attention",
}


def some(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", some(BUGS))
def test_each_bug_is_caught(name):
    bug = BUGS[name]
    with planted(bug):
        assert broken(bug.pattern, bug.mesh) == bug.caught


@pytest.mark.parametrize("pattern", some(sorted({bug.pattern for bug in BUGS.values()})))
def test_without_a_bug_nothing_is_broken(pattern):
    assert broken(pattern, {"data": 2, "seq": 4}) == set()
