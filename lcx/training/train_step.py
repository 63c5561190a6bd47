"""One step of training, as a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcx.config import Config
from lcx.models.cross_entropy import token_losses
from lcx.parallel.sharding import constrain
from lcx.params import path_name
from lcx.training import health
from lcx.training.carried_state import cut, enter, join, leave
from lcx.training.schedules import schedule_shape
from lcx.training.train_state import Blueprint, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    config: Config, plan: Blueprint, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function (state, batch) -> (next state, metrics), to be jitted with the state donated.

    Metrics are scalars, but for "histograms": arrays of the mixers' by name, shown as such, and "limits": why a step
    was skipped, of lcx.training.health. A skipped step advances the counters alone.
    """
    shape = schedule_shape(config.optimizer, config.train.steps)
    differentiate = make_gradients(config, plan)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before = enter(state.carried, state.data_index)
        gradients, metrics, after = differentiate(state.params, batch, before)
        grad_norm = optax.tree.norm(gradients)
        bad, judged, limits = health.judge(config.health, state.health, state.data_index, metrics["loss"], grad_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        carried = leave(state.carried, after, state.data_index)
        metrics = metrics | {
            "tokens": jnp.sum(batch["loss_weights"] > 0, dtype=jnp.int32),
            "grad_norm": grad_norm,
            "learning_rate": config.optimizer.learning_rate * shape(updates_made(state.opt_state)),
            "skipped": bad.astype(jnp.int32),
            "limits": limits,
            "batch_hash": batch_hash(batch),
        }
        kept = (params, opt_state, carried)
        if limits:
            kept = health.choose(bad, (state.params, state.opt_state, state.carried), kept)
        params, opt_state, carried = kept
        data_index = health.index_from(state.data_index + 1, judged)
        return TrainState(params, opt_state, state.step + 1, data_index, state.rng, carried, judged), metrics

    return step


def updates_made(opt_state: Any) -> jax.Array:
    """The updates that the schedule has counted, int32 []: steps, but for those that were skipped."""
    is_count = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return next(node.count for node in jax.tree.leaves(opt_state, is_leaf=is_count) if is_count(node))


def make_gradients(config: Config, plan: Blueprint) -> Callable[..., tuple[dict, Metrics, dict | None]]:
    """The function (parameters, batch, state=None) -> (gradients of the loss, metrics: "loss" and the mixers', state).

    The rows begin with the given state of the model, which no gradient flows into; None is an empty one. The state
    that is returned is the one after the rows, or None where none was given.

    The loss is the mean over the tokens of the whole batch, by their weights, however many pieces the batch is
    accumulated from and whichever of them hold no token that counts.
    """
    accumulate = config.train.accumulate

    def loss(
        params: dict, batch: Batch, state: dict | None, total_weight: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, dict | None]]:
        model = plan.model(params)
        hidden, after, aux = model.hidden(batch["tokens"], state, batch["positions"], batch["segment_ids"])
        losses, log_denominators = token_losses(
            model.output_table, hidden, batch["targets"], config.train.loss_chunk_size
        )
        weights = batch["loss_weights"].astype(losses.dtype) / total_weight
        mean = jnp.sum(weights * losses)
        total = mean + config.train.z_loss * jnp.sum(weights * jnp.square(log_denominators))
        for value in collect(aux, "losses").values():
            total += value / accumulate
        metrics = {"loss": accumulate * mean, "histograms": histograms(aux)} | collect(aux, "metrics")
        return total, (metrics, None if state is None else after)

    def differentiate(params: dict, batch: Batch, state: dict | None = None) -> tuple[dict, Metrics, dict | None]:
        weight = total_weight(batch["loss_weights"])

        def add(gradients: dict, piece: tuple[Batch, dict | None]) -> tuple[dict, tuple[Metrics, dict | None]]:
            new, results = jax.grad(loss, has_aux=True)(params, *piece, weight)
            return jax.tree.map(jnp.add, gradients, new), results

        zeros = jax.tree.map(jnp.zeros_like, params)
        pieces = (_pieces(batch, accumulate), cut(state, accumulate))
        gradients, (metrics, after) = jax.lax.scan(add, zeros, pieces)
        metrics = jax.tree.map(lambda piece: jnp.mean(piece, axis=0), metrics)
        return gradients, metrics, None if after is None else join(after)

    return differentiate


def total_weight(weights: jax.Array) -> jax.Array:
    """What the weights of all tokens of a batch are divided by: their sum, or next to nothing where there are none."""
    return jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)


def collect(aux: dict, kind: str) -> Metrics:
    """The mixers' values of one kind ("metrics" or "losses") as scalars, by layer and name.

    aux: {layer: {mixer: {kind: {name: [periods, ...]}}}}. Metrics are means, over the periods and within a vector;
    losses are summed.
    """
    reduce = {"metrics": jnp.mean, "losses": jnp.sum}[kind]
    return {name: reduce(value) for name, value in _values(aux, kind).items()}


def histograms(aux: dict) -> Metrics:
    """The mixers' metrics that are more than a number a layer, [periods, ...], by layer and name.

    Their means are among the scalars, and TensorBoard shows one kind of thing under a name: so these get another.
    """
    return {f"{name}/histogram": value for name, value in _values(aux, "metrics").items() if value.ndim > 1}


def _values(aux: dict, kind: str) -> Metrics:
    found = {layer: {mixer: record.get(kind, {}) for mixer, record in mixers.items()} for layer, mixers in aux.items()}
    return {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(found)}


def batch_hash(batch: Batch) -> jax.Array:
    """A uint32 that changes with any token, segment, position or row index of the batch, and with their order.

    Integer sums, so that it does not depend on how the batch is sharded.
    """
    total = jnp.zeros((), jnp.uint32)
    for salt, name in enumerate(("tokens", "segment_ids", "positions", "row_index"), start=1):
        values = batch[name].astype(jnp.uint32)
        place = jnp.arange(values.size, dtype=jnp.uint32).reshape(values.shape)
        mixed = _scramble(values + _scramble(place * jnp.uint32(8) + jnp.uint32(salt)))
        total += jnp.sum(mixed, dtype=jnp.uint32)
    return total


def _scramble(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers that spreads each bit over all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _pieces(batch: Batch, count: int) -> Batch:
    """The batch cut into `count` pieces along a new first axis; every device's rows are shared among all pieces."""

    def cut(array: jax.Array) -> jax.Array:
        pieces = array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
        return constrain(pieces, (None, "batch", "time")[: pieces.ndim])

    return jax.tree.map(cut, batch)
