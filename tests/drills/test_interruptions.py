"""Runs that are killed, or asked to stop, end as the run that was left alone: bit for bit."""

import json
import os
import random
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.drills.runs import Run, assert_same_run, committed, logged, save_seconds, saving

pytestmark = pytest.mark.slow

WORKERS = "--config.data.worker_processes=2"
SHARED = Path("/dev/shm")


def killed_run(workdir: Path, steps: int, kills: int, in_saves: int) -> dict[str, int]:
    """A run that is killed `kills` times: `in_saves` inside a save, the others anywhere, also before the first step."""
    draw, seen, counts = random.Random(0), 0, {"inside a save": 0, "elsewhere": 0}
    shared = set(SHARED.iterdir())
    for kill in range(kills):
        run = Run(workdir, steps, WORKERS)
        if counts["inside a save"] >= in_saves and kill % 5 == 4:
            time.sleep(draw.uniform(0, 12))  # starting, loading, restoring, compiling
        else:
            # No later than the kills that are left can still find new steps.
            wanted = seen + draw.randint(1, max(1, (steps - 20 - seen) // (kills - kill)))
            run.wait_until(lambda wanted=wanted: len(logged(workdir)) >= wanted)
            if counts["inside a save"] < in_saves:
                run.wait_until(lambda: saving(workdir))
            else:
                time.sleep(draw.uniform(0, 0.15))
        run.kill()
        counts["inside a save" if saving(workdir) else "elsewhere"] += 1
        seen = max(seen, len(logged(workdir)))
    Run(workdir, steps, WORKERS).finish()
    mine = {path for path in set(SHARED.iterdir()) - shared if path.stat().st_uid == os.getuid()}
    assert not mine, "something is left in shared memory"
    return counts


@pytest.mark.parametrize("kills, steps", [(2, 40), pytest.param(50, 1000, marks=pytest.mark.long)])
def test_kills(undisturbed, tmp_path, record, kills, steps):
    """With worker processes; the run that was left alone reads in threads."""
    counts = killed_run(tmp_path / "killed", steps, kills, in_saves=kills // 2)
    print(f"kills: {counts}")
    assert counts["inside a save"] >= kills // 3
    assert_same_run(tmp_path / "killed", undisturbed(steps), steps)
    if kills < 50:
        return
    record(
        f"{kills} kill -9 at random moments, {counts['inside a save']} of them inside a save, two worker processes",
        f"{kills} resumes; parameters, optimizer and metrics bitwise equal; no process, no shared memory left",
        "final parameters bitwise equal, nothing manual, no process left",
    )


# Where a run is, by what it has said and written: each is asked to stop as soon as it is there.
PHASES = {
    "start": lambda run: run.log.exists(),
    "compilation": lambda run: "compiling" in run.said(),
    "training": lambda run: len(logged(run.workdir)) % 5 == 3,
    "evaluation": lambda run: len(logged(run.workdir)) % 5 == 1,  # of the step after it, which is logged late
    "saving": lambda run: saving(run.workdir),
}
SHORT = ["training", "saving"]


@pytest.mark.parametrize("phases, rounds", [(SHORT, 1), pytest.param(list(PHASES), 4, marks=pytest.mark.long)])
def test_signals_in_each_phase(undisturbed, tmp_path, record, phases, rounds):
    """Asked to stop again and again, it saves and leaves within the time of a save and five seconds, and goes on."""
    workdir, waited, slowest, steps = tmp_path / "signalled", [], 0.0, 40 if rounds == 1 else 120
    evaluating = "--config.evaluation.every=2"
    for number in range(rounds * len(phases)):
        phase = phases[number % len(phases)]
        begun = len(logged(workdir))
        run = Run(workdir, steps, evaluating, log=tmp_path / f"{number}.log")
        if phase in ("training", "evaluation", "saving"):
            run.wait_until(lambda: len(logged(workdir)) > begun)  # noqa: B023
        run.wait_until(lambda: PHASES[phase](run))  # noqa: B023
        if phase == "start":
            time.sleep(0.7)  # Python has begun, and caught the signals
        sent = time.monotonic()
        run.process.send_signal((signal.SIGTERM, signal.SIGINT)[number % 2 if rounds == 1 else 0])
        text = run.finish(75)
        waited.append((time.monotonic() - sent, phase))
        slowest = max(slowest, save_seconds(workdir))
        assert waited[-1][0] < slowest + 5, f"in {phase}: {waited[-1][0]:.1f} s with saves of {slowest:.1f} s"
        assert "To go on, give the same command" in text and f"--workdir={workdir}" in text
        lines = logged(workdir)
        assert not lines or lines[-1]["step"] in committed(workdir), "the last step done is saved"
    Run(workdir, steps, evaluating).finish()
    losses = [[line["loss"] for line in logged(path)] for path in (workdir, undisturbed(steps))]
    assert losses[0] == losses[1]
    if rounds == 1:
        return
    record(
        f"SIGTERM in {', '.join(phases)}",
        f"{len(waited)} of {len(waited)} saved, exit 75; the longest took {max(waited)[0]:.1f} s, "
        f"where a save takes up to {slowest:.1f} s",
        "saved and exit 75 within the measured save time plus 5 seconds",
    )


@pytest.mark.long
def test_a_deadline_is_kept(tmp_path, record):
    """--stop_at: all is saved, and the process gone, before it."""
    deadline = time.time() + 60
    text = datetime.fromtimestamp(deadline).isoformat()
    run = Run(tmp_path / "run", 100_000, f"--stop_at={text}")
    said = run.finish(75)
    left = deadline - time.time()
    assert 0 < left < 30 and "--stop_at: a save needs up to" in said
    assert logged(tmp_path / "run")[-1]["step"] in committed(tmp_path / "run")
    record("--stop_at", f"saved and gone {left:.1f} s before the deadline", "before the deadline")


@pytest.mark.long
def test_two_runs_on_one_workdir(tmp_path, record):
    run = Run(tmp_path / "run", 100_000)
    run.wait_until(lambda: len(logged(tmp_path / "run")) >= 3)
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    second = Run(tmp_path / "run", 100_000, log=tmp_path / "second.log")
    said = second.finish(2)
    assert f"is in use by process {run.process.pid}" in said and "Traceback" not in said
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == before
    reached = len(logged(tmp_path / "run"))
    run.wait_until(lambda: len(logged(tmp_path / "run")) > reached)
    run.process.send_signal(signal.SIGTERM)
    run.finish(75)
    record("two runs on one workdir", "the second: a sentence, exit 2; the first goes on", "the second is refused")
