"""A hundred steps: lcx's own train step beside PyTorch's AdamW, from the same weights over the same batches."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch

from lcx.config import Config
from lcx.data import batch as read_batch
from lcx.interop.tables import to_lcx
from lcx.training.trainer import lower_step, make_program
from tests.parity.pairs import PAIRS, Pair, named_arrays

pytestmark = pytest.mark.parity

STEPS, ROWS, TIME = 100, 4, 64
TOLERANCE = 1e-4
OPTIMIZER = dict(
    name="adamw",
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=10,
    final_ratio=0.1,
    weight_decay=0.5,
    betas=(0.9, 0.95),
    eps=1e-8,
    clip_norm=1.2,
)


def text(length: int, seed: int) -> bytes:
    """Words of a small vocabulary: a bigram model of bytes is far better than chance, and memory better still."""
    random = np.random.default_rng(seed)
    words = [bytes(random.integers(97, 123, size, np.uint8)) for size in random.integers(2, 8, 40)]
    return b" ".join(words[word] for word in random.zipf(1.3, length) % 40)[:length]


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    """make_config(pair): a run on one device, over documents shorter than a row where the model there can pack."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)

    def make(pair: Pair) -> Config:
        lengths = np.random.default_rng(1).integers(1, 2 * TIME, 400) if pair.packs else [2 * STEPS * ROWS * TIME]
        for number, length in enumerate(lengths):
            (tmp_path / f"{number:03}.txt").write_bytes(text(int(length), seed=number % 7))
        sections = dict(
            data={"sources": [{"name": "words", "path": tmp_path}], "tokenizer": "bytes", "workers": 0},
            train={"steps": STEPS, "batch_size": ROWS, "sequence_length": TIME, "loss_chunk_size": 48},
            mesh={"data": 1},
            optimizer=OPTIMIZER,
        )
        return Config.from_dict(sections | {"model": pair.section})

    return make


def train_here(config: Config, pair: Pair, weights: dict, batches: list[dict]) -> dict[str, np.ndarray]:
    """Loss, gradient norm and learning rate of each step of lcx's compiled train step."""
    program = make_program(config)
    state = program.create()
    params = to_lcx(weights, pair.table, program.blueprint.shapes)
    params = jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), params, state.params)
    state = dataclasses.replace(state, params=params)
    step, lines = lower_step(program).compile(), []
    for batch in batches:
        state, metrics = step(state, program.put(batch))
        lines.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")})
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def decays(name: str) -> bool:
    """Matrices, the convolution's taps among them; not norms, biases, A_log and D."""
    return name.endswith(".weight") and "norm" not in name


def train_there(pair: Pair, model: torch.nn.Module, batches: list[dict]) -> dict[str, np.ndarray]:
    """The same from PyTorch's own optimizer, clipping and scheduler."""
    peak, warmup, final = (OPTIMIZER[name] for name in ("learning_rate", "warmup_steps", "final_ratio"))

    def shape(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        progress = (done + 1 - warmup) / (STEPS - warmup)
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if decays(name)], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [p for name, p in named.items() if not decays(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=OPTIMIZER["betas"], eps=OPTIMIZER["eps"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    lines = []
    for batch in batches:
        tokens, targets, positions = (torch.from_numpy(batch[key]).long() for key in ("tokens", "targets", "positions"))
        weights = torch.from_numpy(batch["loss_weights"])
        losses = torch.nn.functional.cross_entropy(
            pair.logits(model, tokens, positions).flatten(0, 1), targets.flatten(), reduction="none"
        )
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_norm"])
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2"])
def test_a_hundred_steps(name, make_config, say):
    pair = PAIRS[name]
    config, model = make_config(pair), pair.make(seed=2)
    batches = [read_batch(config, index) for index in range(STEPS)]
    borders = sum(int((batch["positions"][:, 1:] == 0).sum()) for batch in batches)
    assert borders > STEPS if pair.packs else borders == 0, "documents should share rows just where both can pack"

    here = train_here(config, pair, named_arrays(model), batches)
    there = train_there(pair, model, batches)
    fall = there["loss"][:5].mean() - there["loss"][-5:].mean()
    clipped = int((there["grad_norm"] > OPTIMIZER["clip_norm"]).sum())
    worst = {key: np.abs(here[key] - there[key]).max() for key in here}
    where = int(np.abs(here["loss"] - there["loss"]).argmax())
    say(
        f"{name}: {STEPS} steps, loss {there['loss'][0]:.3f} to {there['loss'][-1]:.3f}, largest difference "
        f"{worst['loss']:.1e} at step {where + 1}; {clipped} steps clipped, {borders} borders inside rows"
    )
    assert fall > 1.5, "the losses hardly move, so they prove little"
    assert 5 <= clipped <= STEPS - 5, "some steps should be clipped and some not"
    assert worst["learning_rate"] < 1e-6 * OPTIMIZER["learning_rate"]
    np.testing.assert_allclose(here["grad_norm"], there["grad_norm"], rtol=1e-4)
    assert worst["loss"] < TOLERANCE
