"""Disks that are full, damaged or closed, and batches that are spoilt."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lcx.cli.load import read_config
from lcx.files import read_lines
from lcx.training.checkpointing import Checkpoints
from lcx.training.trainer import make_program
from tests.drills.runs import Run, assert_same_run, committed, logged

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("counts", [(6, 2), pytest.param((30, 10), marks=pytest.mark.long)])
def test_flips_and_truncations(undisturbed, tmp_path, record, counts):
    """Of the newest checkpoint of a real run, in any of its files: noticed before anything is trained."""
    whole = undisturbed(40) / "checkpoints"
    program = make_program(read_config(whole.parent))
    draw, found = random.Random(0), {"flip": 0, "truncation": 0}
    files = sorted(path.relative_to(whole) for path in (whole / "40").rglob("*") if path.is_file())
    manifest = Path("40.manifest.json")
    for kind in ["flip"] * counts[0] + ["truncation"] * counts[1]:
        folder = tmp_path / "checkpoints"
        shutil.copytree(whole, folder)
        victim = folder / draw.choice([*files, manifest])
        data = bytearray(victim.read_bytes())
        if kind == "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        victim.write_bytes(data)
        said = []
        checkpoints = Checkpoints(folder, 3, said.append)
        try:
            step, _ = checkpoints.restore(program.abstract)
        finally:
            checkpoints.close()
        shutil.rmtree(folder)
        assert step == 35 and "step 40 is damaged" in said[0], (kind, victim)
        found[kind] += 1
    assert tuple(found.values()) == counts
    if counts[0] == 30:
        record(
            "bits flipped in, and bytes cut from, any file of the newest checkpoint",
            "30 of 30 flips and 10 of 10 truncations detected, the checkpoint before it used",
            "30 of 30 and 10 of 10 detected before training goes on",
        )


def mount(folder: Path, *options: str) -> None:
    """Mounts a small file system in memory; skips where that is not allowed."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for some checkpoints."""
    mount(tmp_path / "disk", "-o", "size=8m")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


@pytest.mark.long
def test_a_full_disk(small_disk, tmp_path, record):
    """It fills up in mid-run; when there is room again, the run ends as one that was left alone."""
    workdir = small_disk / "run"
    run = Run(workdir, 60, log=tmp_path / "run.log")
    run.wait_until(lambda: len(committed(workdir)) >= 2)
    stuffing = small_disk / "stuffing"
    with stuffing.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    said = run.finish(2)
    assert "Traceback" not in said and "error: " in said.splitlines()[-1], said[-2000:]
    kept = committed(workdir)
    assert kept
    stuffing.unlink()
    Run(workdir, 60, log=tmp_path / "again.log").finish()
    assert f"going on from step {max(kept)}" in (tmp_path / "again.log").read_text()
    alone = small_disk / "alone"
    Run(alone, 60, log=tmp_path / "alone.log").finish()
    assert_same_run(workdir, alone, 60)
    record(
        "full disk (tmpfs)",
        "a sentence, exit 2, the last checkpoint whole; with room again it ends bitwise as a run left alone",
        "stops cleanly with the last checkpoint whole, exit 2",
    )


@pytest.mark.long
def test_a_workdir_that_becomes_read_only(small_disk, tmp_path, record):
    workdir = small_disk / "run"
    run = Run(workdir, 100_000, log=tmp_path / "run.log")
    run.wait_until(lambda: len(committed(workdir)) >= 2)
    folder = str(workdir / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    try:
        said = run.finish(2)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    assert "Traceback" not in said and "cannot be written" in said.splitlines()[-1], said[-2000:]
    assert committed(workdir)
    record("read-only checkpoints in mid-run", "a sentence, exit 2, the last checkpoint whole", "a sentence, exit 2")


# A script that trains on batches of which some are spoilt: FAULTS="17:nan 18:spike".
SPOILT = """
import os, runpy, sys
import numpy as np
import lcx.data

faults = dict(pair.split(":") for pair in os.environ["FAULTS"].split())
read_ahead = lcx.data.read_ahead

def spoilt(config, start=0, rows=None):
    for index, batch in read_ahead(config, start, rows):
        fault = faults.get(str(index))
        if fault == "nan":
            batch["loss_weights"][0, 3] = np.nan
        elif fault == "spike":
            batch["targets"] = (batch["targets"] * 7 + index) % 256
        yield index, batch

lcx.data.read_ahead = spoilt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FAULTS = {9: "nan", 60: "spike", 70: "spike", 71: "spike", 72: "nan", 73: "spike"}


@pytest.mark.long
def test_faults_in_batches(tmp_path, record):
    """Two runs with the same faults, one of them killed and stopped in between, end bitwise equal."""
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT)
    command = [sys.executable, str(script), "scripts/train.py"]
    faults = {"FAULTS": " ".join(f"{index}:{fault}" for index, fault in FAULTS.items()), "PYTHONPATH": os.getcwd()}
    flags = ["--config.health.window=32", "--config.health.threshold=8", "--config.health.patience=4"]
    steps = 100

    def start(name: str) -> Run:
        return Run(tmp_path / name, steps, *flags, command=command, environment=faults, log=tmp_path / f"{name}.log")

    start("whole").finish()
    for wanted in (30, 72, 76):
        run = start("killed")
        run.wait_until(lambda wanted=wanted: any(line["step"] >= wanted for line in logged(tmp_path / "killed")))
        run.kill()
    start("killed").finish()
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps)
    files = [(tmp_path / name / "quarantine.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    lines = logged(tmp_path / "whole")
    assert [line["data_index"] for line in lines if line["skipped"]] == [9, 60]
    indices = [line["data_index"] for line in lines]
    assert indices == [*range(70), *range(74, 104)], "the streak is stepped over"
    assert all(row["documents"] for line in read_lines(tmp_path / "whole" / "quarantine.jsonl") for row in line["rows"])
    record(
        "a NaN, a spike, and a streak of spikes; also killed three times",
        "two runs bitwise equal; the streak's data stepped over after one rewind",
        "two runs with the same fault end bitwise equal",
    )
