"""`lcx train`: wires config, data, trainer and evaluation into a run."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lcx.cli.flags import CONFIG, WORKDIR, Flag, parse, read_config
from lcx.errors import UserError
from lcx.training import preemption  # the standard library alone: signals are caught before the heavy imports

if TYPE_CHECKING:
    from lcx.config import Config

SUMMARY = "Trains a model. The same command with the same workdir goes on where the run was."
DRY_RUN = Flag("dry_run", "prints how each parameter is laid out over the mesh, and trains nothing", bool, False)
INSPECT = Flag("inspect_data", "shows so many batches as text instead of training", int, 0, limits={"lower_bound": 0})
STOP_AT = Flag("stop_at", "saves and leaves before a time: 2026-11-22T18:00, +1h30m from now, or seconds since 1970")
INTERRUPTED = 75  # what a scheduler takes as: start me again


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code. An interrupted run is saved and ends the process with 75."""
    values = parse("train", SUMMARY, [CONFIG, replace(WORKDIR, required=False), STOP_AT, DRY_RUN, INSPECT], argv)
    config = read_config(values)
    if values.dry_run:
        from lcx.cli.dry_run import layout  # takes seconds: JAX, flax

        print(layout(config))
        return 0
    if values.inspect_data:
        from lcx.cli.inspect_data import inspect_data
        from lcx.config import Config

        inspect_data(Config.from_dict(config), values.inspect_data)
        return 0
    if not values.workdir:
        raise UserError(f"lcx train needs --{WORKDIR.name}: {WORKDIR.help}.")
    deadline = None if values.stop_at is None else _deadline(values.stop_at)
    preemption.install()
    try:
        train(config, values.workdir, deadline)
    except preemption.Interrupted:
        from lcx.parallel import processes

        command = shlex.join(["python", *sys.argv] if sys.argv[0].endswith(".py") else sys.argv)
        if processes.is_first():
            print(f"Interrupted; all steps are saved. To go on, give the same command:\n  {command}", flush=True)
        sys.stderr.flush()
        processes.leave()
        os._exit(INTERRUPTED)  # a compilation may still be running in a thread, and would be waited for
    return 0


def _deadline(text: str) -> float:
    """Seconds since 1970. Raises UserError for what is no time to come."""
    now = time.time()
    try:
        deadline = preemption.parse_deadline(text, now)
    except (ValueError, OverflowError):
        raise UserError(f'--stop_at="{text}" is no time: write 2026-11-22T18:00, +1h30m or +SECONDS.') from None
    if deadline <= now:
        raise UserError(f'--stop_at="{text}" is over: give a time to come.')
    return deadline


def train(config: "Config | Mapping[str, Any]", workdir: str, deadline: float | None = None) -> dict[str, Any]:
    """Trains the model of a config in a workdir, or goes on with the run that is there.

    deadline: seconds since 1970, before which the run is saved and Interrupted raised.

    Returns the final evaluation, as evaluation/heldout.json has it. Raises UserError for what the user can mend, and
    Interrupted where `preemption.install` was called and the process is asked to stop.
    """
    from lcx.cli.run import run  # takes seconds: JAX, flax, orbax

    return run(config, workdir, deadline)
