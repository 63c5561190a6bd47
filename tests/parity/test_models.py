"""Whole models: the logits and the gradient of every parameter, in float32."""

import jax
import numpy as np
import pytest
import torch

from lcx.config import Config
from lcx.interop.tables import to_lcx
from lcx.laws.measure import deviation
from lcx.models.cross_entropy import token_losses
from lcx.training.train_state import Blueprint, blueprint
from tests.parity.pairs import PAIRS, VOCAB, Pair, named_arrays, named_gradients

pytestmark = pytest.mark.parity

BATCH, TIME = 3, 40
LOGITS, GRADIENT = 1e-4, 1e-3
BORDERS = {"single": [[], [], []], "documents": [[1, 7, 29], [20], []]}


def rows(borders: list[list[int]]) -> dict[str, np.ndarray]:
    """Random tokens, and targets that have nothing to do with them, in documents that begin at 0 and the borders."""
    random = np.random.default_rng(0)
    index = np.arange(TIME)
    segments = np.stack([1 + np.searchsorted(row, index, side="right") for row in borders])
    starts = np.stack([np.array([0, *row])[segment - 1] for row, segment in zip(borders, segments, strict=True)])
    return {
        "tokens": random.integers(0, VOCAB, (BATCH, TIME), np.int32),
        "targets": random.integers(0, VOCAB, (BATCH, TIME), np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": (index - starts).astype(np.int32),
    }


def lcx_results(plan: Blueprint, params: dict, batch: dict) -> dict:
    """Logits and gradients of the mean loss."""

    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        model = plan.model(params)
        hidden, _, _ = model.hidden(batch["tokens"], None, batch["positions"], batch["segment_ids"])
        losses, _ = token_losses(model.output_table, hidden, batch["targets"], chunk_size=16)
        return losses.mean(), model.logits(hidden)

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return {"logits": logits, "gradients": gradients}


def torch_results(pair: Pair, model: torch.nn.Module, plan: Blueprint, batch: dict) -> dict:
    """The same of the model there, in lcx's layout."""
    tokens, targets, positions = (torch.from_numpy(batch[name]).long() for name in ("tokens", "targets", "positions"))
    logits = pair.logits(model, tokens, positions)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {"logits": logits.detach().numpy(), "gradients": to_lcx(named_gradients(model), pair.table, plan.shapes)}


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
@pytest.mark.parametrize("name", PAIRS)
def test_logits_and_gradients(name, borders, request, say):
    pair, batch = PAIRS[name], rows(borders)
    model = pair.make(seed=1)
    plan = blueprint(Config.from_dict({"model": pair.section}))
    expected = torch_results(pair, model, plan, batch)
    found = lcx_results(plan, to_lcx(named_arrays(model), pair.table, plan.shapes), batch)
    logits, gradient = (deviation({kind: found[kind]}, {kind: expected[kind]}) for kind in ("logits", "gradients"))
    largest = np.abs(found["logits"] - expected["logits"]).max()
    say(f"{request.node.callspec.id}: logits {logits.value:.1e} (largest {largest:.1e}), worst gradient {gradient}")
    assert logits.value < LOGITS and largest < LOGITS, logits
    assert gradient.value < GRADIENT, gradient
