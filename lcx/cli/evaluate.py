"""`lcx evaluate`: suites on a checkpoint or an export, once or as checkpoints come; or a page of several runs."""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

from lcx.cli.flags import WORKDIR, Flag, parse
from lcx.errors import UserError

if TYPE_CHECKING:
    from lcx.cli.variant import Trained

SUMMARY = """Runs evaluation suites on a run's checkpoint or on an export: evaluation/<suite>.json, a PNG beside it,
TensorBoard. With --compare, draws one page of what was found of several runs.

Suites: perplexity, passkey, needle, ruler, longbench, babilong, recall, entropy, heads, state, cache.
Any field of the run's config may be set for this evaluation, --set model.mixers.swa.window=512 for a variant of the
model, --set evaluation.options.passkey.lengths=[512,4096] for a suite's options."""
FLAGS = [
    replace(WORKDIR, required=False, help="the folder of a run or an export"),
    Flag("suite", "suites to run, with commas between them (default: those of the run's config)"),
    Flag("step", "the checkpoint to evaluate (default: the newest)", kind=int, limits={"lower_bound": 0}),
    Flag("set", "KEY=VALUE, a field of the config; as often as wanted", kind=list),
    Flag("cache", "a cache policy for full attention: h2o:budget=256; see docs/evaluation.md"),
    Flag("follow", "go on with each new checkpoint, until the run has ended", kind=bool, default=False),
    Flag("out", "where to write (default: evaluation/ in the workdir; with --compare: comparison.html)"),
    Flag("compare", "workdirs with commas between them: draw one page of what was found of them"),
]
POLL_SECONDS = 5.0


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("evaluate", SUMMARY, FLAGS, argv)
    if values.compare:
        return compare(values)
    if not values.workdir:
        raise UserError(f"lcx evaluate needs --{WORKDIR.name}, a run or an export, or --compare.")
    changes = read_changes(values.set or [])
    if values.follow:
        return follow(values, changes)
    evaluate(values, changes, values.step)
    return 0


def read_changes(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text) of each --set. Raises UserError for one without a value."""
    changes = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text} needs a value: --set {text}=VALUE.")
        changes.append((key.strip(), value.strip()))
    return changes


def compare(values: SimpleNamespace) -> int:
    """Writes the page of several runs."""
    from lcx.evaluation.compare import read_runs, write_page

    if values.suite or values.workdir:
        raise UserError("--compare shows what was found before: leave out --workdir and --suite.")
    path = values.out or "comparison.html"
    write_page(path, read_runs([name.strip() for name in values.compare.split(",") if name.strip()]))
    print(f"the comparison: {path}")
    return 0


def evaluate(values: SimpleNamespace, changes: Sequence[tuple[str, str]], step: int | None) -> "Trained":
    """Runs the suites on one checkpoint."""
    from lcx.cli.run import use_compilation_cache  # takes seconds: JAX, flax, orbax
    from lcx.cli.suites import run_suites
    from lcx.cli.variant import open_trained

    use_compilation_cache()
    if values.suite:
        changes = [*changes, ("evaluation.suites", values.suite)]
    trained = open_trained(values.workdir, step, changes, values.cache or "")
    if not trained.config.evaluation.suite_names:
        raise UserError("no suite is named: give --suite=passkey,perplexity, or set evaluation.suites in the config.")
    print(f"{trained.folder}, step {trained.step:,}{trained.variant and ', ' + trained.variant}", flush=True)
    run_suites(trained, values.out, say=lambda text: print(text, flush=True))
    return trained


def follow(values: SimpleNamespace, changes: Sequence[tuple[str, str]]) -> int:
    """Evaluates the newest checkpoint whenever there is a new one, until the run has all its steps."""
    if values.step is not None:
        raise UserError("--follow takes each checkpoint as it comes: leave out --step.")
    from lcx.training.checkpointing import newest

    done, waiting = None, False
    while True:
        step = newest(f"{values.workdir}/checkpoints", say=lambda _: None)
        if step is None or step == done:
            if not waiting:
                print(f"waiting for the next checkpoint in {values.workdir}; Ctrl-C ends this", flush=True)
            waiting = True
            time.sleep(POLL_SECONDS)
            continue
        try:
            trained = evaluate(values, changes, step)
        except UserError:
            if newest(f"{values.workdir}/checkpoints", say=lambda _: None) == step:
                raise
            continue  # it was removed for a newer one meanwhile
        done, waiting = step, False
        if step >= trained.config.train.steps:
            return 0
