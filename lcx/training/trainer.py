"""The loop: a run is a fold of `train_step` over batches, with reports and checkpoints on the side."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from lcx.config import Config, remat_chunk
from lcx.errors import UserError
from lcx.parallel.mesh import batch_shards, make_mesh
from lcx.parallel.sharding import activation_sharding
from lcx.training.checkpointing import Checkpoints
from lcx.training.optimizers import make_optimizer
from lcx.training.preemption import Interrupted, interrupted, run_interruptible
from lcx.training.telemetry import Telemetry
from lcx.training.train_state import Blueprint, TrainState, abstract_state, blueprint, create_state
from lcx.training.train_step import make_train_step

HostBatch = dict[str, np.ndarray]
Batches = Callable[[int], Generator[tuple[int, HostBatch]]]  # from a data_index on, without end


@dataclass(frozen=True)
class Program:
    """What a config trains, before any value exists: made once, in the order in which mistakes should be found."""

    config: Config
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    abstract: TrainState  # shapes, dtypes and shardings
    create: Callable[[], TrainState]
    step: Callable  # (state, batch) -> (state, metrics)

    @property
    def batch_shardings(self) -> dict[str, NamedSharding]:
        """The sharding of each array of a batch."""
        return {name: activation_sharding(axes, self.mesh) for name, axes in BATCH_AXES.items()}

    def put(self, batch: HostBatch) -> dict[str, jax.Array]:
        """A batch on the devices."""
        return jax.device_put(batch, self.batch_shardings)


BATCH_AXES = {name: ("batch", "time") for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights")} | {
    "row_index": ("batch",)
}


def make_program(config: Config, chips: Sequence[jax.Device] | None = None) -> Program:
    """Builds the model abstractly on the mesh of these devices, None for all that are visible.

    Raises UserError for what cannot be trained.
    """
    plan = blueprint(config)
    mesh = make_mesh(config.mesh, chips)
    check_batch(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, plan.declarations)
    abstract = abstract_state(plan, optimizer, mesh)
    step = make_train_step(config, plan, optimizer)
    return Program(config, mesh, plan, abstract, lambda: create_state(config, optimizer, abstract), step)


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError where a batch does not divide over the mesh, or time is to be scanned that the mesh cuts."""
    rows, pieces = config.train.batch_size, batch_shards(mesh) * config.train.accumulate
    if rows % pieces:
        raise UserError(
            f"train.batch_size={rows} does not divide over {batch_shards(mesh)} devices (mesh.data times mesh.fsdp) "
            f"and train.accumulate={config.train.accumulate}; make it a multiple of {pieces}."
        )
    if config.train.sequence_length % mesh.shape["seq"]:
        raise UserError(
            f"train.sequence_length={config.train.sequence_length} does not divide over mesh.seq={mesh.shape['seq']}; "
            "make it a multiple of that."
        )
    by_chunks = [name for name, policy in config.model.remat.items() if remat_chunk(policy)]
    if by_chunks and mesh.shape["seq"] > 1:
        raise UserError(
            f'model.remat.{by_chunks[0]}="{config.model.remat[by_chunks[0]]}" goes through time chunk by chunk, which '
            f'mesh.seq={mesh.shape["seq"]} cuts over devices: choose "full", or mesh.seq=1.'
        )


def lower_step(program: Program) -> jax.stages.Lowered:
    """The train step traced and lowered for the program's mesh, with the state donated; nothing is executed."""
    train = program.config.train
    shapes = {name: (train.batch_size, train.sequence_length)[: len(axes)] for name, axes in BATCH_AXES.items()}
    batch = {
        name: jax.ShapeDtypeStruct(
            shape,
            np.float32 if name == "loss_weights" else np.int32,
            sharding=program.batch_shardings[name],
        )
        for name, shape in shapes.items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)
    with jax.set_mesh(program.mesh):
        return jax.jit(program.step, donate_argnums=0, out_shardings=(shardings, None)).lower(program.abstract, batch)


def fit(
    program: Program,
    checkpoints: Checkpoints,
    telemetry: Callable[[int], Telemetry],
    batches: Batches,
    evaluate: Callable[[dict, int], dict[str, float]],
) -> TrainState:
    """Trains to train.steps, from the newest checkpoint if there is one.

    Args:
      program: what is trained.
      checkpoints: of the run.
      telemetry: opens the run's reports from the step that it goes on from.
      batches: reads batches from a data_index on.
      evaluate: (parameters, step) to scalars for the step's line of metrics; called every evaluation.every steps.

    Returns the final state, saved. Raises Interrupted, also with everything saved, where the process is asked to stop.
    """
    config = program.config
    restored = checkpoints.restore(program.abstract)
    saved, state = restored or (None, run_interruptible(program.create))
    step = saved or 0
    if step >= config.train.steps:
        return state
    train_step = run_interruptible(lambda: lower_step(program).compile())
    with telemetry(step) as report, closing(batches(int(state.data_index))) as reader:
        if step:
            report.say(f"going on from step {step}")
        log = _StepLog(config, report, step)
        late = None  # the step whose metrics are still on their way: the next one is dispatched before they are fetched
        while step < config.train.steps and not interrupted.is_set():
            data_index, batch = next(reader)
            state, metrics = train_step(state, program.put(batch))
            if late:
                log(*late)
            step += 1
            scores = _scores(evaluate, state, step) if _due(step, config.evaluation.every) else {}
            late = (step, data_index, metrics, scores)
            if _due(step, config.checkpoint.every):
                log(*late)  # before the checkpoint: a resumed run logs only what comes after it
                checkpoints.save(step, state)
                saved, late = step, None
        if late:
            log(*late)
        if saved != step:
            checkpoints.save(step, state)
        checkpoints.wait()
    if step < config.train.steps:
        raise Interrupted(interrupted.signal_name)
    return state


class _StepLog:
    """Turns the metrics of steps into lines of the report."""

    def __init__(self, config: Config, report: Telemetry, step: int):
        self.config, self.report = config, report
        self.logged_step, self.logged_time = step, time.perf_counter()

    def __call__(self, step: int, data_index: int, metrics: dict[str, jax.Array], scores: dict[str, float]) -> None:
        """Waits for a step to end and logs it, if it is one of those that are."""
        jax.block_until_ready(metrics)
        self.report.advance(step)
        config = self.config
        if not (scores or step == config.train.steps or _due(step, config.logging.every)):
            return
        now = time.perf_counter()
        tokens = (step - self.logged_step) * config.train.batch_size * config.train.sequence_length
        rate = tokens / (now - self.logged_time)
        self.logged_step, self.logged_time = step, now
        line = {"step": step, "data_index": data_index, "tokens_per_second": rate, "mfu": None, "skipped": 0}
        line["tokens_per_second_per_device"] = rate / jax.device_count()
        values = jax.device_get(metrics)
        histograms = values.pop("histograms")
        self.report.log(line | values | scores, histograms)


def _scores(evaluate: Callable, state: TrainState, step: int) -> dict[str, float]:
    try:
        return evaluate(state.params, step)
    except Interrupted:
        return {}  # the loop ends by itself, and saves


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
