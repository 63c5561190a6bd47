"""`lcx sweep`: expands a sweep file, runs its trials and draws the report."""

import html
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lcx.cli.flags import CONFIG, WORKDIR, Flag, parse
from lcx.errors import UserError
from lcx.training import preemption  # the standard library alone: signals are caught before the heavy imports

SUMMARY = """\
Runs the trials of a sweep file, each a run of `lcx train` in a workdir of its own, and draws report.html. The same
command with the same workdir goes on: finished trials are skipped, interrupted ones resumed, failed ones tried again.
Exit code 0: all finished; 1: some failed; 75: interrupted."""
FLAGS = [
    Flag(
        CONFIG.name, "a Python file with get_sweep, and its options: configs/sweeps/families.py:steps=50", required=True
    ),
    Flag(WORKDIR.name, "the folder of the sweep: its trials, their results, the report", required=True),
    Flag("jobs", "trials at a time", int, 1, limits={"lower_bound": 1}),
    Flag("slurm", "submit the trials to SLURM instead of running them here", bool, False),
    Flag("list", "show the trials and what was solved for, and run nothing", bool, False),
    Flag("trial", "run this one alone, by its place in the list from 0: a task of a SLURM array", int),
]
REDRAW = 30.0  # seconds between two drawings of the report while trials run


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("sweep", SUMMARY, FLAGS, argv)
    preemption.install()
    try:
        return sweep(values)
    except preemption.Interrupted:
        return interrupted()


def sweep(values: SimpleNamespace) -> int:
    """Expands the sweep, runs it and draws its report."""
    from lcx.sweeps.expand import expand
    from lcx.sweeps.folder import Folder
    from lcx.sweeps.spec import load_sweep

    if values.overrides:
        raise UserError(f"lcx sweep: --config.{values.overrides[0][0]}: set fields in the sweep file, under `set`.")
    sweep = load_sweep(values.config)
    measure = Measure()
    trials = preemption.run_interruptible(lambda: expand(sweep, measure))
    for trial in trials:
        measure(trial.config, "parameters")  # builds it abstractly: a mistake is found before anything runs
    if values.list:
        print(listing(trials, measure))
        return 0
    folder = Folder(values.workdir)
    if values.trial is not None:
        return run_one(values, sweep, trials, folder)
    start = starter(values, sweep, folder)
    with folder.locked():
        folder.write_trials(trials, {"sweep": values.config})
        return run_all(values, sweep, trials, folder, start, measure)


def run_all(values: SimpleNamespace, sweep: Any, trials: list, folder: Any, start: Callable, measure: "Measure") -> int:
    """Runs all trials, redrawing the report as they end."""
    import time

    from lcx.sweeps.run import Listed, run
    from lcx.sweeps.search import Searched

    source = Searched(sweep, trials, folder) if sweep.search else Listed(trials)
    seen = {trial.name: trial for trial in ([] if sweep.search else trials)}
    drawn = [0.0]

    def draw(now: bool = False) -> None:
        if now or time.monotonic() - drawn[0] > REDRAW:
            draw_report(values, sweep, list(seen.values()), folder, measure, suites=now)
            drawn[0] = time.monotonic()

    def begin(trial: Any) -> Any:
        seen[trial.name] = trial
        return start(trial)

    total = len(trials) * (sweep.search.trials if sweep.search else 1)
    print(f"{total} trials, {values.jobs} at a time; workdir: {folder.path}", flush=True)
    outcome = run(sweep, source, folder, begin, values.jobs, preemption.interrupted.is_set, say=say, ended=draw)
    draw(now=True)
    print(f"report: {folder.path / 'report.html'}")
    if outcome.interrupted:
        return interrupted()
    done = len(outcome.finished) + len(outcome.skipped)
    print(f"{done} of {total} finished, {len(outcome.skipped)} of them before")
    for name in outcome.failed:
        print(f"failed: {name}; see {folder.log(name)}")
    return 1 if outcome.failed else 0


def run_one(values: SimpleNamespace, sweep: Any, trials: list, folder: Any) -> int:
    """One trial in this process's place, as a task of an array; the report is drawn by a later call without it."""
    from lcx.sweeps.local import command

    if sweep.search:
        raise UserError("--trial: a search has no list of trials; leave it out.")
    if not 0 <= values.trial < len(trials):
        raise UserError(f"--trial={values.trial}: the sweep has trials from 0 to {len(trials) - 1}.")
    trial = trials[values.trial]
    if folder.result(trial, sweep.metric) is not None:
        print(f"{trial.name} has finished before")
        return 0
    folder.write_trial(trial)
    words = command(folder, trial)
    print(shlex.join(words), flush=True)
    os.execv(words[0], words)


def starter(values: SimpleNamespace, sweep: Any, folder: Any) -> Callable:
    """What begins an attempt of a trial: here, or on SLURM."""
    if values.slurm:
        from lcx.sweeps.slurm import starter

        return starter(sweep, folder)
    from lcx.sweeps.local import Local

    return Local(folder, values.jobs)


def draw_report(
    values: SimpleNamespace, sweep: Any, trials: list, folder: Any, measure: "Measure", suites: bool
) -> None:
    """Writes report.json and report.html. suites: with what they found, whose pictures take some seconds."""
    from lcx.files import write_bytes, write_json
    from lcx.sweeps.page import page
    from lcx.sweeps.summary import summarize

    report = summarize(Path(values.config.partition(":")[0]).stem, sweep, trials, folder, measure)
    write_json(folder.path / "report.json", report)
    write_bytes(folder.path / "report.html", page(report, evaluation(report, folder) if suites else "").encode())


def evaluation(report: Mapping[str, Any], folder: Any) -> str:
    """What suites found of the finished trials, as HTML: the mean over those that differ in seeds alone."""
    if all(path.name == "heldout.json" for path in folder.path.glob("trials/*/evaluation/*.json")):
        return ""
    from lcx.evaluation.compare import read_groups, sections  # imports what draws, which takes a second

    groups: dict[str, list[Path]] = {}
    for trial in report["trials"]:
        if trial["status"] == "finished":
            groups.setdefault(trial["group"], []).append(folder.path / trial["workdir"])
    try:
        return sections(read_groups(groups))
    except UserError as error:  # a damaged file of one trial is no reason to stop the others
        return f"<p>{html.escape(str(error))}</p>"


def listing(trials: list, measure: "Measure") -> str:
    """The trials as a table: number, name, parameters, FLOPs a token, steps, what was solved for."""
    rows = [("", "trial", "parameters", "FLOPs/token", "steps", "solved for")]
    for number, trial in enumerate(trials):
        chosen = ", ".join(f"{key.removeprefix('model.')}={value}" for key, value in trial.chosen.items())
        counts = [measure(trial.config, what) for what in ("parameters", "flops")]
        cells = ["?" if found is None else f"{found:,.0f}" for found in counts]
        rows.append((str(number), trial.name, *cells, str(trial.config["train"]["steps"]), chosen))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class Measure:
    """Counts parameters and FLOPs a token of configs; each model once."""

    def __init__(self):
        self._found: dict[str, dict[str, float]] = {}

    def __call__(self, config: Mapping[str, Any], what: str) -> float | None:
        """`what`: "parameters", or "flops": forward, of a token in a document of train.sequence_length.

        None where a mixer does not know its FLOPs. Raises UserError for a model that cannot be built.
        """
        import json

        length = config["train"]["sequence_length"]
        key = json.dumps([config["model"], length], sort_keys=True)
        if key not in self._found:
            self._found[key] = self._count(config["model"], length)
        return self._found[key][what]

    def _count(self, model: Mapping[str, Any], length: int) -> dict[str, float | None]:
        import jax

        from lcx import planning

        jax.config.update("jax_platforms", "cpu")  # accelerators are the trials'
        abstract = planning.abstract_model(model)
        return {
            "parameters": planning.parameter_count(abstract),
            "flops": planning.flops_per_token(abstract, length),
        }


def say(text: str) -> None:
    """One line, now."""
    print(text, flush=True)


def interrupted() -> int:
    """Says how to go on; returns the exit code."""
    command = shlex.join(["python", *sys.argv] if sys.argv[0].endswith(".py") else sys.argv)
    print(f"Interrupted; all trials are saved. To go on, give the same command:\n  {command}", flush=True)
    return 75
