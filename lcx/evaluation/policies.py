"""Cache policies: what trained full attention may keep of the past, or read of it, as evaluation modes.

A policy turns a model into one with the same parameters whose full attention has another cache; every suite runs on it
unchanged, and its state's bytes are what it keeps. None of this is trained, so none of it is bound by the laws.

    sink_window   the first tokens and the latest ones (StreamingLLM, Xiao et al., arXiv 2309.17453)
    lm_infinite   the same, but positions stay those of the text, and a distance is at most the window (LM-Infinite,
                  Han et al., arXiv 2308.16137)
    h2o           half the latest tokens, half those that were attended to most (H2O, Zhang et al., arXiv 2306.14048)
    spatten       the same with the attention of all heads of a layer together (SpAtten, Wang et al., arXiv 2012.09852,
                  within a layer: tokens that an earlier layer dropped are not dropped here too)
    quest         all tokens are kept, pages of them are read (Quest, Tang et al., arXiv 2406.10774)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.errors import UserError, suggest
from lcx.evaluation.streaming import evicting
from lcx.layers.rotary import rotate
from lcx.mixers.attention import Attention
from lcx.mixers.base import Aux, Context, State
from lcx.models import LanguageModel
from lcx.schema import build, coerce, limited

PAGE = 16  # keys of a page of Quest
NEVER = -1  # the place of a slot that holds no token

Turn = Callable[[jax.Array, jax.Array], jax.Array]  # (heads [batch, n, heads, K], positions [batch, n, heads])


class Policy(Protocol):
    """What a policy is to attention: a cache, and one token's attention over it."""

    def init(self, batch: int, kv_heads: int, width: int, max_length: int, dtype: Any) -> dict[str, jax.Array]:
        """The empty cache for documents of at most max_length tokens."""

    def attend(self, cache: dict, token: "Token", turn: Turn) -> tuple[jax.Array, dict]:
        """Takes a token in and attends: (out [batch, kv_heads, group, K], the cache)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Token:
    """One token of each row, as attention sees it."""

    query: jax.Array  # [batch, kv_heads, group, K], not turned to a position
    key: jax.Array  # [batch, kv_heads, K], likewise
    value: jax.Array  # [batch, kv_heads, K]
    position: jax.Array  # int32 [batch], in the document; the cache holds nothing of another document
    sink: jax.Array | None  # [kv_heads, group], logits in the softmax's denominator
    dense: jax.Array  # bool []: the layer reads all that there is


@dataclass(frozen=True)
class SinkWindow:
    """Options of sink_window: the first `sinks` tokens and the latest ones, positions as in the cache."""

    budget: int = limited(1024, minimum=2)  # tokens kept, the sinks among them
    sinks: int = limited(4, minimum=0)


@dataclass(frozen=True)
class LMInfinite:
    """Evicts the oldest token but the first ones; a first token comes no farther away than the window is wide."""

    budget: int = limited(1024, minimum=2)  # tokens kept for each head, the first ones among them
    sinks: int = limited(10, minimum=0)

    def worth(self, cache: dict, position: jax.Array) -> jax.Array:
        """The token with the least is evicted: [batch, slots, kv_heads]."""
        place = cache["place"]
        return jnp.where(place < self.sinks, jnp.inf, place.astype(jnp.float32))

    def places(self, cache: dict, position: jax.Array) -> jax.Array:
        """Where each key stands for its rotation."""
        return jnp.maximum(cache["place"], position[:, None, None] - (self.budget - self.sinks))

    def attention_seen(self, weights: jax.Array) -> jax.Array:
        """What a token's attention [batch, slots, kv_heads, group] adds to the slots' scores."""
        return jnp.zeros(weights.shape[:3], weights.dtype)

    forget = 1.0


@dataclass(frozen=True)
class HeavyHitters:
    """Evicts, of all but the latest tokens, the one with the least attention so far."""

    budget: int = limited(1024, minimum=2)  # tokens kept for each head
    recent: float = limited(0.5, minimum=0, maximum=1)  # share of the budget that the latest tokens have
    # What a past score is multiplied by at each token; below 1 early tokens lose their lead (A2SF, arXiv 2407.20485).
    forget: float = limited(1.0, above=0, maximum=1)

    def worth(self, cache: dict, position: jax.Array) -> jax.Array:
        latest = cache["place"] > position[:, None, None] - max(1, round(self.recent * self.budget))
        return jnp.where(latest, jnp.inf, cache["score"])

    def places(self, cache: dict, position: jax.Array) -> jax.Array:
        return cache["place"]

    def attention_seen(self, weights: jax.Array) -> jax.Array:
        return weights.sum(-1)


@dataclass(frozen=True)
class TokenPruning(HeavyHitters):
    """The same, but a token is kept or dropped by all heads of a layer together."""

    def attention_seen(self, weights: jax.Array) -> jax.Array:
        return jnp.broadcast_to(weights.sum((-1, -2))[..., None], weights.shape[:3])


@dataclass(frozen=True)
class Slots:
    """A cache of `budget` slots for each head; its rule says whose slot the next token gets."""

    rule: LMInfinite | HeavyHitters

    def init(self, batch: int, kv_heads: int, width: int, max_length: int, dtype: Any) -> dict[str, jax.Array]:
        slots = (batch, min(self.rule.budget, max_length), kv_heads)
        held = {name: jnp.zeros((*slots, width), dtype) for name in ("key", "value")}
        return held | {"place": jnp.full(slots, NEVER, jnp.int32), "score": jnp.zeros(slots, jnp.float32)}

    def attend(self, cache: dict, token: Token, turn: Turn) -> tuple[jax.Array, dict]:
        rule, position = self.rule, token.position
        restart = (position == 0)[:, None, None]
        cache = cache | {
            "place": jnp.where(restart, NEVER, cache["place"]),
            "score": jnp.where(restart, 0, cache["score"]),
        }
        worth = jnp.where(cache["place"] == NEVER, -jnp.inf, rule.worth(cache, position))
        chosen = jnp.argmin(worth, axis=1)[:, None] == jnp.arange(worth.shape[1])[None, :, None]
        new = {"key": token.key, "value": token.value, "place": position[:, None], "score": jnp.float32(0)}
        for name, value in new.items():
            wide = chosen[..., None] if cache[name].ndim == 4 else chosen
            value = value[:, None] if value.ndim else value
            cache[name] = jnp.where(wide, value, cache[name]).astype(cache[name].dtype)
        there = cache["place"] != NEVER
        keys = turn(cache["key"], rule.places(cache, position))
        query = _turned(token.query, position, turn)
        weights = attention_weights(query, keys, there, token.sink)
        cache["score"] = rule.forget * cache["score"] + rule.attention_seen(weights)
        return mixed(weights, cache["value"]), cache


@dataclass(frozen=True)
class Quest:
    """Reads the pages of 16 keys whose scores can be largest, for each query head."""

    budget: int = limited(1024, minimum=1)  # tokens read; at least three pages
    dense_layers: int = limited(2, minimum=0)  # the first attention layers, which read all

    @property
    def pages(self) -> int:
        """How many are read."""
        return max(3, self.budget // PAGE)

    def init(self, batch: int, kv_heads: int, width: int, max_length: int, dtype: Any) -> dict[str, jax.Array]:
        count = -(-max_length // PAGE)
        held = {name: jnp.zeros((batch, count * PAGE, kv_heads, width), dtype) for name in ("key", "value")}
        page = (batch, count, kv_heads, width)
        return held | {"low": jnp.full(page, jnp.inf, dtype), "high": jnp.full(page, -jnp.inf, dtype)}

    def attend(self, cache: dict, token: Token, turn: Turn) -> tuple[jax.Array, dict]:
        position = token.position
        restart = (position == 0)[:, None, None, None]
        key = turn(token.key[:, None], jnp.broadcast_to(position[:, None, None], (*token.key.shape[:1], 1, 1)))
        here = (jnp.arange(cache["key"].shape[1]) == position[:, None])[..., None, None]
        keys = jnp.where(here, key, cache["key"]).astype(cache["key"].dtype)
        values = jnp.where(here, token.value[:, None], cache["value"]).astype(cache["value"].dtype)
        low, high = jnp.where(restart, jnp.inf, cache["low"]), jnp.where(restart, -jnp.inf, cache["high"])
        page = (jnp.arange(low.shape[1]) == position[:, None] // PAGE)[..., None, None]
        low = jnp.where(page, jnp.minimum(low, key), low).astype(cache["low"].dtype)
        high = jnp.where(page, jnp.maximum(high, key), high).astype(cache["high"].dtype)
        query = _turned(token.query, position, turn)
        used = jnp.arange(low.shape[1]) <= position[:, None] // PAGE
        bounds = jnp.where(used[..., None, None], page_bounds(query, low, high), -jnp.inf)  # [batch, pages, kv, group]
        least = jax.lax.top_k(jnp.moveaxis(bounds, 1, -1), min(self.pages, low.shape[1]))[0][..., -1]
        chosen = (bounds >= least[:, None]) | token.dense
        there = jnp.repeat(chosen & used[..., None, None], PAGE, axis=1)
        there &= (jnp.arange(keys.shape[1]) <= position[:, None])[..., None, None]
        weights = attention_weights(query, keys, there, token.sink)
        return mixed(weights, values), {"key": keys, "value": values, "low": low, "high": high}


def page_bounds(query: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Quest's upper bound of every score of a page: the sum over channels of max(q low, q high).

    Args: query [batch, kv_heads, group, K]; low, high [batch, pages, kv_heads, K], the least and the largest value of
    each channel among the page's keys. Returns: [batch, pages, kv_heads, group].
    """
    low, high = (jnp.where(jnp.isfinite(side), side, 0)[:, :, :, None] for side in (low, high))
    query = query[:, None]
    return jnp.sum(jnp.maximum(query * low, query * high), axis=-1)


def attention_weights(query: jax.Array, keys: jax.Array, there: jax.Array, sink: jax.Array | None) -> jax.Array:
    """Softmax over slots: query [batch, kv_heads, group, K], keys [batch, slots, kv_heads, K], there a bool of the
    slots, by kv head and perhaps by group. Returns: float [batch, slots, kv_heads, group]."""
    scores = jnp.einsum("bhgk,bshk->bshg", query, keys.astype(query.dtype)) * query.shape[-1] ** -0.5
    there = there if there.ndim == 4 else there[..., None]
    scores = jnp.where(there, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -jnp.inf)
    largest = jnp.max(scores, axis=1)
    largest = largest if sink is None else jnp.maximum(largest, sink)
    weights = jnp.exp(scores - largest[:, None])
    total = jnp.sum(weights, axis=1)
    total = total if sink is None else total + jnp.exp(sink - largest)
    return weights / total[:, None]


def mixed(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[batch, slots, kv_heads, group] and [batch, slots, kv_heads, V] to [batch, kv_heads, group, V]."""
    return jnp.einsum("bshg,bshv->bhgv", weights, values.astype(weights.dtype))


def _turned(query: jax.Array, position: jax.Array, turn: Turn) -> jax.Array:
    """[batch, kv_heads, group, K] turned to a row's position."""
    flat = query.reshape(query.shape[0], 1, -1, query.shape[-1])
    return turn(flat, position[:, None, None]).reshape(query.shape)


class CachedAttention(Attention):
    """Full attention token by token over a policy's cache; `policy` and `dense` are set by `apply_policy`."""

    policy: Policy
    dense: nnx.Variable  # bool [periods]

    def __call__(self, x: jax.Array, state: State | None, context: Context) -> tuple[jax.Array, State, Aux]:
        query, key, value = self.project(x)
        batch, time, heads, width = query.shape
        kv_heads = key.shape[2]
        grouped = (kv_heads, heads // kv_heads)
        sink = self._sinks()
        sink = sink if sink is None else sink.reshape(grouped)
        base = self.options.rope_base

        def turn(heads: jax.Array, positions: jax.Array) -> jax.Array:
            if base is None:
                return heads
            by_head = jnp.broadcast_to(positions, heads.shape[:3]).reshape(batch, -1)
            return rotate(heads.reshape(batch, -1, 1, width), by_head, base).reshape(heads.shape)

        def step(cache: dict, token: tuple) -> tuple[dict, jax.Array]:
            query, key, value, position = token
            out, cache = self.policy.attend(
                cache, Token(query.reshape(batch, *grouped, width), key, value, position, sink, self.dense[...]), turn
            )
            return cache, out.reshape(batch, heads, width)

        cache = dict(state) if state else self.init_state(batch, time)
        by_time = [jnp.moveaxis(array, 1, 0) for array in (query, key, value, context.lookback)]
        cache, out = jax.lax.scan(step, cache, tuple(by_time))
        return self.output(jnp.moveaxis(out, 0, 1).astype(x.dtype)), cache, {}

    def init_state(self, batch_size: int, max_length: int) -> State:
        return self.policy.init(batch_size, *self.kv_shape, max_length, self.dims.compute_dtype)

    def capacity(self, state: State) -> int | None:
        return None if isinstance(self.policy, Slots) else state["key"].shape[1]


POLICIES: Mapping[str, type] = {
    "sink_window": SinkWindow,
    "lm_infinite": LMInfinite,
    "h2o": HeavyHitters,
    "spatten": TokenPruning,
    "quest": Quest,
}


def apply_policy(model: LanguageModel, text: str) -> LanguageModel:
    """The model with another cache: "h2o:budget=256,recent=0.25", a name of POLICIES and its options.

    Raises UserError for an unknown policy or option, and for a model without full attention.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise UserError(f'unknown cache policy "{name}": {suggest(name, POLICIES)}')
    pairs = dict(part.partition("=")[::2] for part in rest.split(",") if part)
    options = build(POLICIES[name], coerce(pairs, Mapping[str, Any], "--cache"), f"cache policy {name}")
    if isinstance(options, SinkWindow):
        if options.sinks >= options.budget:
            raise UserError(f"cache policy {name}: sinks={options.sinks} leave nothing of budget={options.budget}.")
        return evicting(model, options.budget - options.sinks, options.sinks)
    return cached(model, options if isinstance(options, Quest) else Slots(options))


def cached(model: LanguageModel, policy: Policy) -> LanguageModel:
    """The model whose full attention goes through a policy. Raises UserError where no layer has full attention."""
    model = nnx.clone(model)
    found = full_attention(model)
    if not found:
        raise UserError("no layer of this model has full attention: there is no cache to bound.")
    periods, first = model.stack.periods, getattr(policy, "dense_layers", 0)
    for index, mixer in enumerate(found):
        mixer.__class__ = CachedAttention
        mixer.policy = policy
        mixer.dense = nnx.Variable(jnp.arange(periods) * len(found) + index < first)
    return model


def full_attention(model: LanguageModel) -> list[Attention]:
    """The model's attention without a window, in the order of a period's layers."""
    mixers = (mixer for layer in model.stack.layers.values() for mixer in layer.mixers.values())
    return [mixer for mixer in mixers if isinstance(mixer, Attention) and mixer.options.window is None]


def kept_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of the state of one document of that many tokens."""
    state = jax.eval_shape(lambda: model.init_state(1, length)["layers"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def read_bytes(model: LanguageModel, length: int) -> int:
    """Bytes of the state that the last of that many tokens reads: less than are kept where pages are chosen."""
    total = kept_bytes(model, length)
    for mixer in _quests(model):
        cache = jax.eval_shape(lambda mixer=mixer: mixer.init_state(1, length))
        keys = 2 * cache["key"].size * cache["key"].dtype.itemsize
        sparse = int(jnp.sum(~mixer.dense[...]))
        share = min(1.0, mixer.policy.pages / cache["low"].shape[1])
        total -= round(sparse * keys * (1 - share))
    return total


def _quests(model: LanguageModel) -> list[CachedAttention]:
    mixers = (mixer for layer in model.stack.layers.values() for mixer in layer.mixers.values())
    return [mixer for mixer in mixers if isinstance(mixer, CachedAttention) and isinstance(mixer.policy, Quest)]
