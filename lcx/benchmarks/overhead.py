"""What a run does beside its compiled steps: reading data, logging, TensorBoard, checkpoints."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from lcx.benchmarks.harness import Result, Timing, ratio, seconds_of
from lcx.benchmarks.models import stepper
from lcx.config import Config
from lcx.training.train_state import TrainState
from lcx.training.trainer import Program

EVERY = 50  # steps from one checkpoint to the next: a round
TURN = 10  # steps from one turn to the next: what slows a machine for seconds then slows both alike


def overhead_results(run: Callable[[Config, str, Callable], Any], config: Config, rounds: int) -> list[Result]:
    """A whole run beside its bare steps, in turns: TURN steps of the run, then TURN of the compiled step alone.

    Args:
      run: trains a config in a workdir; its third argument takes the place of the evaluation, (state, program) to
        scalars, and is called every `evaluation.every` steps.
      config: with a checkpoint every EVERY steps, evaluation every TURN, and (rounds + 1) * EVERY steps in all.
      rounds: those that count; the first one, in which things are opened, does not.
    """
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        run(config, str(Path(folder) / "run"), turns)
    whole, bare = by_rounds(turns.whole), by_rounds(turns.bare)
    share = ratio(whole, bare) - 1
    what = f"a run with data, logging and a checkpoint every {EVERY} steps: time beyond that of its steps alone"
    timings = {"run": whole, "steps": bare}
    return [Result(what, 100 * share, "%", "below 3", share < 0.03, seconds_of(timings))]


def by_rounds(turns: Sequence[float]) -> Timing:
    """The seconds of each round but the first, from those of its turns."""
    size = EVERY // TURN
    return Timing(tuple(sum(turns[start : start + size]) for start in range(size, len(turns), size)))


class Turns:
    """Stands where a run is evaluated: ends the run's turn, and takes one with bare steps of its own."""

    def __init__(self):
        self.whole: list[float] = []
        self.bare: list[float] = []
        self._step: Callable[[], jax.Array] | None = None
        self._begin = time.perf_counter()

    def __call__(self, state: TrainState, program: Program) -> dict[str, float]:
        jax.block_until_ready(state.params)
        self.whole.append(time.perf_counter() - self._begin)
        if self._step is None:
            self._step = stepper(program)
            jax.block_until_ready(self._step())
        begin = time.perf_counter()
        for _ in range(TURN):
            loss = self._step()
        jax.block_until_ready(loss)
        self.bare.append(time.perf_counter() - begin)
        self._begin = time.perf_counter()
        return {}
