"""Runs of a model of one MLP, in this process, on batches that are counted upwards and can be spoilt."""

import dataclasses
import functools
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from lcx.config import Config, default_config
from lcx.parallel.mesh import make_mesh
from lcx.training.beginning import with_beginning
from lcx.training.checkpointing import Checkpoints, read_step
from lcx.training.preemption import Interrupted, interrupted
from lcx.training.quarantine import Quarantine
from lcx.training.telemetry import Telemetry
from lcx.training.trainer import Program, Surroundings, fit, make_program
from lcx.training.watchdog import Watchdog

ROWS, TIME = 4, 16


def config(**changes) -> Config:
    values = default_config().to_dict()
    values["model"] |= {"pattern": "mlp", "mixers": {"mlp": {"type": "mlp", "d_ff": 8}}, "d_model": 8, "vocab_size": 32}
    values["train"] |= {"steps": 24, "batch_size": ROWS, "sequence_length": TIME}
    values["optimizer"] |= {"learning_rate": 0.1, "warmup_steps": 4}
    values["mesh"] |= {"data": 1}
    values["checkpoint"] |= {"every": 5, "keep": 2}
    values["health"] |= {"window": 16, "threshold": 5.0, "patience": 3}
    values["logging"] |= {"every": 4}
    for section, fields in changes.items():
        values[section] |= fields
    return Config.from_dict(values)


@functools.cache
def program() -> Program:
    return make_program(config(), make_mesh(config().mesh, jax.devices()[:1]))


def batch(index: int, fault: str | None) -> dict[str, np.ndarray]:
    """Rows that count upwards from a token of each row; a fault makes a loss that is not finite, or is large."""
    random = np.random.default_rng(index)
    tokens = (random.integers(0, 32, (ROWS, 1)) + np.arange(TIME + 1)) % 32
    weights = np.ones((ROWS, TIME), np.float32)
    targets = tokens[:, 1:]
    if fault == "nan":
        weights[0, 3] = np.nan
    elif fault == "spike":
        targets = (targets + 16) % 32
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": targets.astype(np.int32),
        "segment_ids": np.ones((ROWS, TIME), np.int32),
        "positions": np.arange(TIME, dtype=np.int32)[None].repeat(ROWS, 0),
        "loss_weights": weights,
        "row_index": np.arange(index * ROWS, (index + 1) * ROWS, dtype=np.int32),
    }


class Run:
    """A run with faults, in parts: it is asked to stop before each of these data indices is read."""

    def __init__(self, folder: Path, faults: Mapping[int, str], stops: tuple[int, ...] = (), **changes: dict):
        self.folder, self.faults, self.stops = folder, faults, list(stops)
        self.program = dataclasses.replace(
            program(), stage=dataclasses.replace(program().stage, config=config(**changes))
        )
        self.said: list[str] = []

    def batches(self, start: int) -> Iterator[tuple[int, dict]]:
        index = start
        while True:
            if index in self.stops:
                self.stops.remove(index)
                interrupted.set("test")
            yield index, batch(index, self.faults.get(index))
            index += 1

    def part(self):
        """Until the end, or a stop: the final state."""
        checkpoints = Checkpoints(self.folder / "checkpoints", 2, self.said.append)
        documents = lambda index: [{"source": "counts", "documents": [f"from {index}"]}]  # noqa: E731
        try:
            return fit(
                with_beginning([self.program], self.folder / "imported"),
                Surroundings(
                    checkpoints=checkpoints,
                    quarantine=Quarantine(epath.Path(self.folder), documents, self.said.append),
                    watchdog=Watchdog(0),
                    telemetry=lambda step: Telemetry(
                        self.folder / "metrics.jsonl", 24, step, console=Console(file=io.StringIO(), width=200)
                    ),
                    batches=self.batches,
                    evaluate=lambda state, program: {},
                ),
            )
        finally:
            checkpoints.close()
            interrupted.clear()

    def until_a_stop(self) -> None:
        with pytest.raises(Interrupted):
            self.part()

    def restored(self, step: int):
        """The state that was saved after a step."""
        return jax.device_get(read_step(self.folder / "checkpoints", step, self.program.abstract))

    def whole(self):
        while True:
            try:
                return jax.device_get(self.part())
            except Interrupted:
                pass

    def lines(self, name: str = "metrics.jsonl") -> list[dict]:
        lines = [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
        return [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
