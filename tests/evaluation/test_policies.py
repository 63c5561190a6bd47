"""Cache policies: with room for everything they are full attention; with less, what papers say, token by token."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.config import ModelConfig
from lcx.errors import UserError
from lcx.evaluation.policies import (
    CachedAttention,
    HeavyHitters,
    LMInfinite,
    Quest,
    Slots,
    TokenPruning,
    apply_policy,
    cached,
    full_attention,
    kept_bytes,
    page_bounds,
    read_bytes,
)
from lcx.evaluation.streaming import row_losses
from lcx.layers.rotary import rotate
from lcx.mixers import Context
from lcx.models import LanguageModel
from lcx.params import create

TIME = 64
TOKENS = np.random.default_rng(0).integers(0, 16, (2, TIME + 1), np.int32)


@cache
def make(sink=None, periods=2):
    attention = {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "sink": sink}
    config = ModelConfig(
        pattern="attention", mixers={"attention": attention}, periods=periods, d_model=16, vocab_size=16
    )
    model = nnx.merge(*create(lambda: LanguageModel(config, nnx.Rngs(0))))
    scale = lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf  # so that attention is not flat  # noqa: E731
    nnx.update(model, jax.tree.map(scale, nnx.state(model)))
    return model


@pytest.mark.parametrize("policy", ["sink_window", "lm_infinite", "h2o", "spatten", "quest"])
def test_a_budget_of_everything_is_full_attention(policy):
    model = make("logit")
    expected = row_losses(model, TOKENS, 16)
    found = row_losses(apply_policy(model, f"{policy}:budget={TIME + 16}"), TOKENS, 16)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def attend(policy, x):
    """One layer of a policy over x [batch, time, d_model], and its query, key and value."""
    model = cached(make(), policy)
    layer = nnx.clone(model.stack.layers["0_attention"].mixers["attention"])
    take = lambda leaf: leaf[0]  # of the first period  # noqa: E731
    nnx.update(layer, jax.tree.map(take, nnx.state(layer)))
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    context = Context(positions, jnp.ones_like(positions), jnp.zeros(x.shape[0], jnp.int32))
    out, _, _ = layer(x, None, context)
    return np.asarray(out), [np.asarray(side) for side in layer.project(x)], layer


def turn(vector, place):
    return np.asarray(rotate(jnp.array(vector)[None, None, None], jnp.array([[place]]), 1e4))[0, 0, 0]


def reading(policy, query, key, value):
    """The policy in NumPy, one token, head and list of kept places at a time: [batch, time, heads, K]."""
    batch, time, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for row in range(batch):
        kept = {h: [] for h in range(key.shape[2])}
        score = {h: {} for h in range(key.shape[2])}
        for now in range(time):
            weights = {}
            for h in range(key.shape[2]):
                if len(kept[h]) == policy.budget:
                    kept[h].remove(victim(policy, kept[h], score[h], now))
                kept[h].append(now)
                score[h][now] = 0.0
                for g in range(group):
                    q = turn(query[row, now, h * group + g], now)
                    far = policy.budget - getattr(policy, "sinks", 0)
                    place = lambda k: max(k, now - far) if isinstance(policy, LMInfinite) else k  # noqa: E731, B023
                    raw = np.array([q @ turn(key[row, k, h], place(k)) / width**0.5 for k in kept[h]])
                    weights[h, g] = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
                    out[row, now, h * group + g] = weights[h, g] @ value[row, kept[h], h]
            for h in range(key.shape[2]):
                for slot, k in enumerate(kept[h]):
                    seen = [w for (other, _), w in weights.items() if isinstance(policy, TokenPruning) or other == h]
                    score[h][k] = policy.forget * score[h][k] + sum(w[slot] for w in seen)
    return out


def victim(policy, kept, score, now):
    if isinstance(policy, LMInfinite):
        return min(k for k in kept if k >= policy.sinks)
    old = [k for k in kept if k <= now - max(1, round(policy.recent * policy.budget))]
    return min(old, key=lambda k: score[k])


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        LMInfinite(budget=6, sinks=2),
        HeavyHitters(budget=6),
        HeavyHitters(budget=6, recent=0.3, forget=0.9),
        TokenPruning(budget=6),
    ],
)
def test_eviction_is_what_a_reading_of_it_gives(rule):
    x = jax.random.normal(jax.random.key(1), (2, 14, 16)) * 3
    out, (query, key, value), layer = attend(Slots(rule), x)
    expected = np.asarray(layer.output(jnp.asarray(reading(rule, query, key, value), jnp.float32)))
    np.testing.assert_allclose(out, expected, atol=1e-4)
    everything, _, _ = attend(Slots(type(rule)(budget=64)), x)
    assert np.abs(everything[:, 6:] - out[:, 6:]).max() > 1e-2  # what is evicted would have counted


def bound_holds(query, key):
    """Of query [batch, kv, group, K] and key [batch, 48, kv, K]: the bound is above each score of its page."""
    pages = key.reshape(key.shape[0], -1, 16, *key.shape[2:])
    bounds = page_bounds(query, pages.min(2), pages.max(2))
    scores = jnp.einsum("bhgk,bpshk->bpshg", query, pages)
    assert bool(jnp.all(bounds >= scores.max(2) - 1e-4 * jnp.abs(bounds)))
    return bounds, scores


def test_the_bound_of_a_page_holds():
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 2)
        bound_holds(jax.random.normal(keys[0], (2, 2, 3, 8)) * 10, jax.random.normal(keys[1], (2, 48, 2, 8)) - seed)
    same = jnp.broadcast_to(jax.random.normal(keys[0], (1, 1, 2, 8)), (1, 48, 2, 8))
    bounds, scores = bound_holds(jnp.ones((1, 2, 1, 8)), same)
    np.testing.assert_allclose(bounds, scores[:, :, 0], rtol=1e-5)  # of equal keys the bound is the score


@pytest.mark.slow
def test_quest_reads_the_pages_with_the_largest_bounds():
    x = jax.random.normal(jax.random.key(2), (1, 96, 16)) * 3
    out, (query, key, value), layer = attend(Quest(budget=48, dense_layers=0), x)
    positions = jnp.arange(96)[None]
    query, key = (np.asarray(rotate(jnp.asarray(side), positions, 1e4)) for side in (query, key))
    expected = np.zeros(query.shape)
    for now in range(96):
        for head in range(4):
            here = key[0, : now + 1, head // 2]
            q = query[0, now, head]
            pages = [here[i : i + 16] for i in range(0, now + 1, 16)]
            bounds = [np.maximum(q * page.min(0), q * page.max(0)).sum() for page in pages]
            chosen = np.isin(np.arange(now + 1) // 16, np.argsort(bounds)[-3:])
            scores = np.where(chosen, here @ q / 2, -np.inf)
            weights = np.exp(scores - scores.max())
            expected[0, now, head] = weights / weights.sum() @ value[0, : now + 1, head // 2]
    expected = np.asarray(layer.output(jnp.asarray(expected, jnp.float32)))
    np.testing.assert_allclose(out, expected, atol=1e-4)
    dense, _, _ = attend(Quest(budget=48, dense_layers=2), x)
    assert np.abs(dense[:, 60:] - out[:, 60:]).max() > 1e-2


def test_bytes():
    """A key and a value of two heads of width 4 in float32 are 64 bytes; two layers."""
    model = make()
    assert kept_bytes(model, 128) == 2 * 128 * 64 == read_bytes(model, 128)
    h2o = apply_policy(model, "h2o:budget=32")
    assert kept_bytes(h2o, 128) == kept_bytes(h2o, 1024) == 2 * 32 * (64 + 2 * 8)  # and a place and a score a head
    quest = apply_policy(model, "quest:budget=64,dense_layers=1")
    pages = 2 * 8 * 64  # the least and the largest value of eight pages
    assert kept_bytes(quest, 128) == 2 * 128 * 64 + pages
    assert read_bytes(quest, 128) == 128 * 64 + 64 * 64 + pages  # the first layer reads all


def test_mistakes_are_named():
    with pytest.raises(UserError, match='unknown cache policy "h20": did you mean "h2o"'):
        apply_policy(make(), "h20:budget=3")
    with pytest.raises(UserError, match='unknown key "cache policy h2o.budjet": did you mean "budget"'):
        apply_policy(make(), "h2o:budjet=3")
    with pytest.raises(UserError, match="sinks=4 leave nothing of budget=4"):
        apply_policy(make(), "sink_window:budget=4")
    with pytest.raises(UserError, match="no layer of this model has full attention"):
        apply_policy(apply_policy(make(), "sink_window:budget=8"), "h2o:budget=8")
    assert all(isinstance(mixer, CachedAttention) for mixer in full_attention(apply_policy(make(), "h2o:budget=8")))
    assert not any(isinstance(mixer, CachedAttention) for mixer in full_attention(make()))  # the model is as it was
