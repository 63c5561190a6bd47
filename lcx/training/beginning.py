"""What a run without a checkpoint of its own begins with: another run's checkpoint, imported parameters, or new ones.

In this order: the workdir's own newest whole checkpoint; else `checkpoint.fork`, where the config names a run; else the
parameters that `lcx import_hf` put into the workdir; else parameters drawn from train.seed.
"""

from collections.abc import Sequence
from dataclasses import replace

from etils import epath

from lcx.config import CheckpointConfig
from lcx.errors import UserError
from lcx.parallel import processes
from lcx.training.checkpointing import check_whole, data_index_of, newest, read_newest, read_step
from lcx.training.train_state import TrainState
from lcx.training.trainer import Program, program_at

# What "no_optimizer" takes of a checkpoint: all but the optimizer's statistics.
KEPT = ("params", "step", "data_index", "rng", "carried", "health")


def with_beginning(programs: Sequence[Program], imported: epath.PathLike) -> tuple[Program, ...]:
    """The programs, the first of which creates what the run begins with.

    imported: the folder of the parameters that were imported, which need not be there.

    Raises UserError, when the run is begun, for what is not there, damaged, or of another model.
    """
    first, *rest = programs
    options = first.config.checkpoint
    if options.fork:
        return replace(first, create=lambda: _forked(programs, options)), *rest
    if epath.Path(imported).exists():
        return replace(first, create=lambda: _imported(first, imported)), *rest
    return tuple(programs)


def find_fork(fork: str) -> tuple[epath.Path, int]:
    """The checkpoints and the step of "WORKDIR@STEP", or of "WORKDIR": its newest that is whole.

    Raises UserError where there is none, or it is damaged.
    """
    workdir, at, text = fork.rpartition("@")
    step = int(text) if at and text.isdigit() else None
    folder = epath.Path(workdir if step is not None else fork) / "checkpoints"
    if step is not None:
        check_whole(folder, step)
        return folder, step
    step = newest(folder)
    if step is None:
        raise UserError(f'checkpoint.fork: there is no checkpoint in "{fork}": write WORKDIR or WORKDIR@STEP.')
    return folder, step


def _forked(programs: Sequence[Program], options: CheckpointConfig) -> TrainState:
    folder, step = processes.on_first(lambda: [str(found) for found in find_fork(options.fork)])
    step = int(step)
    if options.fork_state == "parameters":
        params = {"params": programs[0].abstract.params}
        return programs[0].create(read_step(folder, step, params, partial=True)["params"])
    program = program_at(programs, data_index_of(epath.Path(folder), step))
    if options.fork_state == "all":
        return read_step(folder, step, program.abstract)
    wanted = {name: value for name in KEPT if (value := getattr(program.abstract, name)) != {}}
    found = read_step(folder, step, wanted, partial=True)
    return replace(program.create(found.pop("params")), **found)


def _imported(program: Program, folder: epath.PathLike) -> TrainState:
    found = read_newest(folder, {"params": program.abstract.params})
    if found is None:
        raise UserError(f"the imported parameters in {folder} are damaged: import them again.")
    return program.create(found[1]["params"])
