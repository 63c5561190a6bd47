"""The loop: a run is a fold of `train_step` over batches, with reports and checkpoints on the side."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lcx.config import Config, remat_chunk
from lcx.errors import UserError
from lcx.parallel import processes
from lcx.parallel.mesh import make_mesh
from lcx.parallel.sharding import Rules, activation_sharding, batch_shards, on_mesh, shards, spec
from lcx.stages import Stage
from lcx.training import health
from lcx.training.carried_state import empty
from lcx.training.checkpointing import Checkpoints
from lcx.training.optimizers import make_optimizer
from lcx.training.preemption import Interrupted, interrupted, run_interruptible
from lcx.training.quarantine import BadStreak, Quarantine
from lcx.training.stages import model_stages
from lcx.training.telemetry import Telemetry, plain
from lcx.training.train_state import Blueprint, TrainState, abstract_state, blueprint, create_state
from lcx.training.train_step import make_train_step
from lcx.training.watchdog import Watchdog

HostBatch = dict[str, np.ndarray]
Batches = Callable[[int], Generator[tuple[int, HostBatch]]]  # from a data_index on, without end


@dataclass(frozen=True)
class Program:
    """What a config trains, before any value exists: made once, in the order in which mistakes should be found."""

    stage: Stage
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    abstract: TrainState  # shapes, dtypes and shardings
    create: Callable[..., TrainState]  # (parameters to begin with; left out: drawn ones)
    step: Callable  # (state, batch) -> (state, metrics)

    @property
    def config(self) -> Config:
        """Of the stage alone."""
        return self.stage.config

    @cached_property
    def batch_shardings(self) -> dict[str, NamedSharding]:
        """The sharding of each array of a batch."""
        return {name: activation_sharding(axes, self.mesh, self.blueprint.rules) for name, axes in BATCH_AXES.items()}

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows of a batch that this process has to read, int64, ascending: those that its devices hold."""
        count = self.config.train.batch_size
        pieces = self.batch_shardings["row_index"].addressable_devices_indices_map((count,)).values()
        return np.unique(np.concatenate([np.arange(count)[piece] for piece in pieces]))

    def put(self, batch: HostBatch) -> dict[str, jax.Array]:
        """A batch on the devices, from those of its rows that `rows` names."""

        def place(name: str, local: np.ndarray) -> jax.Array:
            def piece(index: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = index[0].indices(self.config.train.batch_size)
                first = np.searchsorted(self.rows, start)
                return local[(slice(first, first + stop - start), *index[1:])]

            shape = (self.config.train.batch_size, *local.shape[1:])
            return jax.make_array_from_callback(shape, self.batch_shardings[name], piece)

        return {name: place(name, local) for name, local in batch.items()}

    def on_mesh(self) -> AbstractContextManager:
        """Where programs over the run's arrays are traced: its mesh and its rules, in this thread."""
        return on_mesh(self.mesh, self.blueprint.rules)

    def enter(self, state: TrainState) -> TrainState:
        """The state of the stage before as this stage goes on with it: its rows carry nothing over, and what loss and
        gradient are usual is seen anew."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (self.abstract.carried, self.abstract.health))
        begin = jax.jit(
            lambda known: (empty(self.abstract.carried), health.restart_window(known)), out_shardings=shardings
        )
        carried, judged = begin(state.health)
        return replace(state, carried=carried, health=judged)


BATCH_AXES = {name: ("batch", "time") for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights")} | {
    "row_index": ("batch",)
}


def make_programs(config: Config, mesh: jax.sharding.Mesh | None = None) -> tuple[Program, ...]:
    """A program for each stage of a run, in order: the model abstractly, on a mesh.

    mesh: None for the config's over all visible devices. One of devices that are not here, or of none (an
    AbstractMesh), serves to lower the step, or to look at it. Raises UserError for what cannot be trained.
    """
    return tuple(_make_program(stage, mesh) for stage in model_stages(config))


def make_program(config: Config, mesh: jax.sharding.Mesh | None = None) -> Program:
    """The program of a run's first stage, which is all of most runs; see `make_programs`."""
    return _make_program(model_stages(config)[0], mesh)


def _make_program(stage: Stage, mesh: jax.sharding.Mesh | None) -> Program:
    config = stage.config
    plan = blueprint(config)
    mesh = mesh or make_mesh(config.mesh)
    check_batch(config, mesh, plan.rules)
    optimizer = make_optimizer(config.optimizer, config.train.steps, plan.declarations)
    abstract = abstract_state(config, plan, optimizer, mesh)
    step = make_train_step(config, plan, optimizer)
    return Program(stage, mesh, plan, abstract, partial(create_state, config, optimizer, abstract), step)


def check_batch(config: Config, mesh: jax.sharding.Mesh, rules: Rules) -> None:
    """Raises UserError where a batch does not divide over the mesh, or time is to be scanned that the mesh cuts."""
    rows, shared, accumulate = config.train.batch_size, batch_shards(mesh, rules), config.train.accumulate
    if rows % (shared * accumulate):
        axes = " times ".join(f"mesh.{axis}" for axis in rules.activations["batch"])
        raise UserError(
            f"train.batch_size={rows} does not divide over {shared} devices ({axes}) "
            f"and train.accumulate={accumulate}; make it a multiple of {shared * accumulate}."
        )
    length, pieces = config.train.sequence_length, shards(spec(("time",), rules.activations, mesh)[0], mesh)
    if length % pieces:
        axes = " times ".join(f"mesh.{axis}" for axis in rules.activations["time"])
        raise UserError(
            f"train.sequence_length={length} does not divide over {axes}={pieces}; make it a multiple of that."
        )
    by_chunks = [name for name, policy in config.model.remat.items() if remat_chunk(policy)]
    if by_chunks and pieces > 1:
        raise UserError(
            f'model.remat.{by_chunks[0]}="{config.model.remat[by_chunks[0]]}" goes through time chunk by chunk, which '
            f'mesh.seq={pieces} cuts over devices: choose "full", or mesh.seq=1.'
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
    everywhere = NamedSharding(program.mesh, PartitionSpec())  # metrics: every process reads them
    with program.on_mesh():
        step = jax.jit(program.step, donate_argnums=0, out_shardings=(shardings, everywhere))
        return step.lower(program.abstract, batch)


Utilisation = Callable[[Program, float], float | None]  # (the stage's program, tokens per second of all devices)


def program_at(programs: Sequence[Program], data_index: int) -> Program:
    """The program of the stage that a data index lies in."""
    return next(program for program in reversed(programs) if program.stage.first_index <= data_index)


@dataclass(frozen=True)
class Surroundings:
    """What a run has beside its programs; the command line puts it together."""

    checkpoints: Checkpoints
    quarantine: Quarantine  # what the run has skipped and steps over
    watchdog: Watchdog  # is told of each step
    telemetry: Callable[[int], Telemetry]  # opens the run's reports from the step that it goes on from
    batches: Batches
    # (state, the stage's program) to scalars for the step's line of metrics, every evaluation.every steps
    evaluate: Callable[[TrainState, Program], dict[str, float]]
    utilisation: Utilisation = lambda program, tokens_per_second: None


def fit(programs: Sequence[Program], around: Surroundings) -> TrainState:
    """Trains to train.steps, from the newest checkpoint if there is one.

    programs: what is trained, of each stage; the first one's `create` begins a run that has no checkpoint.

    Returns the final state, saved. Raises Interrupted, also with everything saved, where the process is asked to stop;
    of several processes all stop after the same step. Raises RunFailed where steps stay bad after all rewinds.
    """
    around.quarantine.finish(around.checkpoints)
    compiled: dict[int, Callable] = {}  # by stage; a rewind compiles nothing again

    def compile_step(program: Program) -> Callable:
        if program.stage.number not in compiled:
            compiled[program.stage.number] = run_interruptible(lambda: lower_step(program).compile())
            processes.meet()
        return compiled[program.stage.number]

    while True:
        try:
            return _train(programs, around, compile_step)
        except BadStreak as error:
            streak = error.with_traceback(None)  # its frames hold the state, which is about to be restored
        around.quarantine.rewind(streak, around.checkpoints, programs[0].config.health.max_rewinds)


def _train(
    programs: Sequence[Program], around: Surroundings, compile_step: Callable[[Program], Callable]
) -> TrainState:
    """As `fit`, but raises BadStreak where the run has to rewind."""
    config = programs[0].config  # steps, and when to do what, are those of all stages
    saved, state = run_interruptible(lambda: _begin(programs, around))
    step = int(state.step)
    if step >= config.train.steps:
        return state
    over, metrics, scores = jax.device_get(state.health), {}, {}
    program = program_at(programs, int(state.data_index))
    train_step = compile_step(program)
    checkpoints, watchdog, reader = around.checkpoints, around.watchdog, around.batches(int(state.data_index))
    with around.telemetry(step) as report, closing(reader), watchdog.watching():
        if step:
            report.say(f"going on from step {step}")
        log = _StepLog(config, report, around)
        late = None  # the step whose metrics are still on their way: the next one is dispatched before they are fetched
        stopped = processes.any_asks(program.mesh, interrupted.is_set)
        while step < config.train.steps and not stopped():
            asked = time.perf_counter()
            data_index, batch = next(pair for pair in reader if health.index_from(pair[0], over) == pair[0])
            log.waited += time.perf_counter() - asked
            state, metrics = train_step(state, program.put(batch))
            if late:
                log(*late)
            step += 1
            watchdog.beat(step)
            scores = {}
            if _due(step, config.evaluation.every):
                with watchdog.paused():
                    scores = _scores(around.evaluate, state, program)
            late = (step, data_index, metrics, scores, program)
            following = program_at(programs, int(health.index_from(data_index + 1, over)))
            if following is not program:
                log(*late)
                late, program = None, following
                state = program.enter(state)  # before a checkpoint, which the next stage is restored from
                if step < config.train.steps:
                    report.say(f"stage {program.stage.number} from data index {program.stage.first_index}: compiling")
                    with watchdog.paused(), suppress(Interrupted):  # the loop ends by itself, and saves
                        train_step = compile_step(program)
            if _due(step, config.checkpoint.every):
                if late:
                    log(*late)  # before the checkpoint: a resumed run logs only what comes after it
                checkpoints.save(step, state, _score(config, metrics, scores), _in_streak(metrics))
                saved, late = step, None
        if late:
            log(*late)
        if saved != step:
            checkpoints.save(step, state, _score(config, metrics, scores), _in_streak(metrics))
        checkpoints.wait()
    if step < config.train.steps:
        raise Interrupted(interrupted.signal_name or "another process was asked to stop")
    return state


def _begin(programs: Sequence[Program], around: Surroundings) -> tuple[int | None, TrainState]:
    """(the step that is saved, the state to go on from): of the newest checkpoint, or of a run that begins."""
    restored = around.checkpoints.restore(lambda data_index: program_at(programs, data_index).abstract)
    saved, state = restored or (None, programs[0].create())
    if intervals := around.quarantine.intervals():
        judged = health.step_over(jax.device_get(state.health), intervals)
        data_index = health.index_from(jax.device_get(state.data_index), judged)
        place = lambda value, leaf: jax.device_put(value, leaf.sharding)  # noqa: E731
        judged = jax.tree.map(place, judged, state.health)
        stages = [program_at(programs, int(index)) for index in (state.data_index, data_index)]
        state = replace(state, health=judged, data_index=place(np.int32(data_index), state.data_index))
        if stages[0] is not stages[1]:
            state = stages[1].enter(state)
    if restored is None and programs[0].config.checkpoint.fork:
        saved = int(state.step)  # at once: what it was forked from may go on, and let its checkpoints go
        around.checkpoints.save(saved, state)
    return saved, state


def _score(config: Config, metrics: dict[str, jax.Array], scores: dict[str, float]) -> float | None:
    """What checkpoint.keep_best chooses by, where the step has it."""
    value = (metrics | scores).get(config.checkpoint.best_metric)
    return None if value is None or np.ndim(value) else float(value)


def _in_streak(metrics: dict) -> bool:
    """Whether the last step was skipped; without a step, no."""
    return bool(metrics and metrics["skipped"])


class _StepLog:
    """Turns the metrics of steps into lines of the report, and finds what is wrong with them."""

    def __init__(self, config: Config, report: Telemetry, around: Surroundings):
        self.config, self.report, self.around = config, report, around
        self.tokens, self.waited, self.logged_time = 0, 0.0, time.perf_counter()

    def __call__(
        self, step: int, data_index: int, metrics: dict[str, jax.Array], scores: dict[str, float], program: Program
    ) -> None:
        """Waits for a step to end and logs it, if it is one of those that are, or was skipped.

        Raises BadStreak where it is the last of so many skipped ones that the run has to rewind.
        """
        jax.block_until_ready(metrics)
        self.report.advance(step)
        config = self.config
        self.tokens += program.config.train.batch_size * program.config.train.sequence_length
        skipped = bool(metrics["skipped"])
        if not (skipped or scores or step == config.train.steps or _due(step, config.logging.every)):
            return
        now = time.perf_counter()
        seconds = now - self.logged_time
        rate, data_wait = self.tokens / seconds, self.waited / seconds
        self.tokens, self.waited, self.logged_time = 0, 0.0, now
        line = {"step": step, "data_index": data_index, "tokens_per_second": rate}
        line["mfu"] = self.around.utilisation(program, rate)
        line["tokens_per_second_per_device"] = rate / jax.device_count()
        line["data_wait_per_second"] = data_wait  # seconds spent waiting for batches, of each since the last line
        values = jax.device_get(metrics)
        histograms, limits = values.pop("histograms"), values.pop("limits")
        self.report.log(line | values | scores, histograms)
        if skipped:
            self._skipped(step, data_index, values, limits)

    def _skipped(self, step: int, data_index: int, values: dict, limits: dict) -> None:
        why = {name: plain(values[name]) for name in ("loss", "grad_norm")}
        why |= {name: plain(limits[name]) for name in ("loss_limit", "grad_norm_limit")}
        self.around.quarantine.record(step, data_index, why)
        self.report.say(
            f"step {step} was skipped: loss {why['loss']} (limit {why['loss_limit']}), "
            f"gradient norm {why['grad_norm']} (limit {why['grad_norm_limit']})"
        )
        streak = int(limits["streak"])
        if streak == 0:
            self.report.say(
                f"step {step} was the last of {self.config.health.patience}: losses are as before, and such "
                "gradient norms count as usual from here on"
            )
        if streak >= self.config.health.patience:
            raise BadStreak([step - streak + 1, step], [int(limits["first_bad"]), data_index + 1])


def _scores(evaluate: Callable, state: TrainState, program: Program) -> dict[str, float]:
    try:
        return evaluate(state, program)
    except Interrupted:
        return {}  # the loop ends by itself, and saves


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
