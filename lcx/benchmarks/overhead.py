"""What a run does beside its compiled steps: reading data, logging, TensorBoard, checkpoints."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lcx.benchmarks.harness import Result, Timing, ratio, seconds_of
from lcx.benchmarks.models import stepper
from lcx.config import Config
from lcx.training.train_state import TrainState
from lcx.training.trainer import Program

EVERY = 50  # steps from one checkpoint to the next, and from one turn to the next


def overhead_results(run: Callable[[Config, str, Callable], Any], config: Config, rounds: int) -> list[Result]:
    """A whole run beside its bare steps, in turns: EVERY steps of the run, then EVERY of the compiled step alone.

    Args:
      run: trains a config in a workdir; its third argument takes the place of the evaluation, (state, program) to
        scalars, and is called every `evaluation.every` steps.
      config: with checkpoints and evaluation every EVERY steps, and (rounds + 1) * EVERY steps in all.
      rounds: turns that count; the first one, in which things are opened, does not.
    """
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        run(config, str(Path(folder) / "run"), turns)
    whole, bare = Timing(tuple(turns.whole[1:])), Timing(tuple(turns.bare[1:]))
    share = ratio(whole, bare) - 1
    what = f"a run with data, logging and a checkpoint every {EVERY} steps: time beyond that of its steps alone"
    timings = {"run": whole, "steps": bare}
    return [Result(what, 100 * share, "%", "below 3", share < 0.03, seconds_of(timings))]


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
        for _ in range(EVERY):
            loss = self._step()
        jax.block_until_ready(loss)
        self.bare.append(time.perf_counter() - begin)
        self._begin = time.perf_counter()
        return {}
