"""Sweeps that are killed in the middle: nothing is left running, and in the end every trial has run once."""

import collections
import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.sweeps.sweep_files import Sweep, finished, journal, small_sweep, steps_logged, trial_processes

STEPS = 600  # of a trial: some seconds, so that it is under way when it is killed
FAMILIES = ["transformer", "mamba", "samba", "infini", "sink"]


def under_way(workdir: Path) -> bool:
    """A trial that has not finished has made steps, and has most of them before it."""
    done, trials = set(finished(workdir)), workdir / "trials"
    left = [len(steps_logged(workdir, path.name)) for path in trials.glob("*") if path.name not in done]
    return any(0 < steps < STEPS / 4 for steps in left)


def in_the_middle(workdir: Path, least: int) -> bool:
    """So many trials have finished, and others are running."""
    return len(finished(workdir)) >= least and under_way(workdir) and bool(trial_processes(workdir))


def killed_twice(file: Path, workdir: Path, trials: int, gone: float) -> None:
    """Runs a sweep that is asked to stop once and killed once; checks what is left behind each time, and the end."""
    for number, code, share in ((signal.SIGTERM, 75, 1 / 3), (signal.SIGKILL, -signal.SIGKILL, 2 / 3)):
        sweep = Sweep(file, workdir, "--jobs=2")
        sweep.wait_until(partial(in_the_middle, workdir, int(share * trials)), 3000)
        sweep.process.send_signal(number)
        sweep.finish(code)
        time.sleep(gone)
        assert trial_processes(workdir) == [], "a trial outlived its sweep"
    text = Sweep(file, workdir, "--jobs=2").finish()
    assert f"{trials} of {trials} finished" in text
    counts = collections.Counter(finished(workdir))
    assert set(counts.values()) == {1}, "no trial is run twice"
    starts = collections.Counter(line["trial"] for line in journal(workdir) if line["event"] == "started")
    assert max(starts.values()) > 1, "a trial that was killed goes on"
    report = json.loads((workdir / "report.json").read_text())
    assert [trial["status"] for trial in report["trials"]] == ["finished"] * trials
    for trial in report["trials"]:
        assert steps_logged(workdir, trial["name"]) == list(range(1, STEPS + 1))
    assert (workdir / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_four_trials_killed_twice(tmp_path):
    file = small_sweep(
        tmp_path, ["transformer"], steps=STEPS, grid={"optimizer.learning_rate": [1e-3, 3e-3], "train.seed": [0, 1]}
    )
    killed_twice(file, tmp_path / "sweep", trials=4, gone=1.0)


@pytest.mark.slow
@pytest.mark.long
def test_thirty_trials_killed_twice(tmp_path):
    grid = {"optimizer.learning_rate": [1e-3, 3e-3, 1e-2], "train.seed": [0, 1]}
    file = small_sweep(tmp_path, FAMILIES, steps=STEPS, grid=grid)
    killed_twice(file, tmp_path / "sweep", trials=30, gone=1.0)
    report = json.loads((tmp_path / "sweep" / "report.json").read_text())
    assert len(report["groups"]) == 15 and all(group["count"] == 2 for group in report["groups"])
