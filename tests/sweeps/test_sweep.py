"""What a sweep file becomes: trials, names, refusals; nothing is trained here."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcx.cli.main import main
from lcx.cli.sweep import Measure
from lcx.config import Config, load_config
from lcx.errors import UserError
from lcx.schema import build
from lcx.sweeps.expand import expand, safe_name, short_names
from lcx.sweeps.folder import Folder
from lcx.sweeps.local import shares
from lcx.sweeps.run import Listed, run
from lcx.sweeps.spec import Sweep, load_sweep
from tests.sweeps.sweep_files import write_sweep

TINY = {"transformer": "configs/transformer.py:size=tiny", "mamba": "configs/mamba.py:size=tiny"}


def no_measure(config, what):
    raise AssertionError("nothing is to be measured")


def trials_of(**fields):
    return expand(build(Sweep, {"configs": TINY} | fields), no_measure)


def test_every_combination_under_a_name_that_says_what_differs():
    trials = trials_of(
        set={"train.steps": 7},
        points=[{"name": "plain"}, {"model.d_model": 64, "optimizer.betas": [0.9, 0.99]}],
        grid={"optimizer.learning_rate": [1e-3, 3e-3], "train.seed": [0, 1]},
    )
    assert len(trials) == len({trial.name for trial in trials}) == 2 * 2 * 2 * 2
    assert trials[0].name == "transformer-plain-learning_rate=0.001-seed=0"
    assert trials[-1].name == "mamba-d_model=64-betas=0.9+0.99-learning_rate=0.003-seed=1"
    assert {trial.group for trial in trials if "plain" in trial.name and trial.family == "mamba"} == {
        "mamba-plain-learning_rate=0.001",
        "mamba-plain-learning_rate=0.003",
    }
    last = Config.from_dict(trials[-1].config)
    assert (last.train.steps, last.train.seed, last.model.d_model, last.optimizer.betas) == (7, 1, 64, (0.9, 0.99))
    assert Config.from_dict(trials[0].config).model == Config.from_dict(load_config(TINY["transformer"])).model


def test_names_are_as_short_as_they_can_be_and_safe():
    assert short_names(["train.seed", "data.seed", "model.d_model"]) == {
        "train.seed": "train.seed",
        "data.seed": "data.seed",
        "model.d_model": "d_model",
    }
    assert safe_name("../a b/<c>") == "_a_b_c_"
    long = safe_name("x" * 300)
    assert len(long) == 160 and long != safe_name("x" * 301)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"grid": {"train.stepz": [1]}}, 'unknown key "train.stepz": did you mean "steps"?'),
        ({"grid": {"model.mixers.mlp.d_ff": [64]}}, 'config mamba: unknown key "model.mixers.mlp"'),
        ({"set": {"train.steps": 0}}, "train.steps must be at least 1"),
        ({"grid": {"train.seed": [0, 0]}}, 'two trials of the sweep are called "transformer-seed=0"'),
        ({"grid": {"train.seed": []}}, 'grid: "train.seed" has no values'),
        ({"grid": {"train.seed": [0]}, "set": {"train.seed": 1}}, '"train.seed" is in both set and grid'),
        ({"sizes": [1e6]}, "sizes are given, but not what they are of"),
        ({"match": "parameter"}, 'match cannot be "parameter": did you mean "parameters"?'),
        ({"match": "tokens", "set": {"train.steps": 5}}, 'match="tokens" decides it'),
        ({"search": {"space": {"optimizer.eps": {"low": 1}}}}, "low must be below high"),
        ({"search": {"space": {"optimizer.eps": {"low": 0, "high": 1, "log": True}}}}, "begins above 0"),
        ({"gird": {}}, 'unknown key "gird": did you mean "grid"?'),
        ({"configs": {"a": "configs/samab.py"}}, 'config file "configs/samab.py" is not there'),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(fields, message, tmp_path, capsys):
    file = write_sweep(tmp_path / "sweep.py", {"configs": TINY} | fields)
    assert main(["sweep", f"--config={file}", f"--workdir={tmp_path / 'never'}"]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and found.count("\n") == 1 and message in found, found
    assert not (tmp_path / "never").exists(), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--slurm"], "there is no SLURM here"),
        (["--jobs=0"], "--jobs"),
        (["--trial=2"], "--trial=2: the sweep has trials from 0 to 1"),
        (["--config.train.steps=3"], "set fields in the sweep file"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    file = write_sweep(tmp_path / "sweep.py", {"configs": TINY})
    assert main(["sweep", f"--config={file}", f"--workdir={tmp_path / 'never'}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_list_runs_nothing(tmp_path, capsys):
    file = write_sweep(tmp_path / "sweep.py", {"configs": TINY, "grid": {"train.seed": [0, 1]}})
    assert main(["sweep", f"--config={file}", f"--workdir={tmp_path / 'never'}", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "885,888" in lines[1] and "mamba-seed=1" in lines[4]
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("path", ["families.py", "ladder.py", "branches.py:run=runs/x,steps=4+8", "search.py"])
def test_shipped_sweeps_are_sweeps(path, monkeypatch):
    assert load_sweep(f"configs/sweeps/{path}").configs


def test_a_branch_decays_from_its_step_on():
    sweep = load_sweep("configs/sweeps/branches.py:run=runs/x,steps=7+500+1000,decay=0.2")
    assert sweep.configs == {"branch": "runs/x/config.json"}
    for point, step in zip(sweep.points, (7, 500, 1000), strict=True):
        steps, fraction = point["train.steps"], point["optimizer.decay_fraction"]
        assert point["checkpoint.fork"] == f"runs/x@{step}"
        assert steps - round(fraction * steps) == step and fraction == pytest.approx(0.2, abs=0.05)


def test_a_folder_has_one_sweep_at_a_time(tmp_path):
    code = (
        "import sys, time; from lcx.sweeps.folder import Folder\n"
        "with Folder(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with (
            pytest.raises(UserError, match=f"in use by process {holder.pid} on "),
            Folder(tmp_path).locked(),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with Folder(tmp_path).locked():
        pass


class Pretended:
    """An attempt that ends at once, with a code and, where that is 0, with a result."""

    def __init__(self, folder: Folder, trial, code: int):
        self.code = code
        if code == 0:
            write_result(folder, trial.name, trial.config["train"]["steps"], loss=1.5)

    def poll(self):
        return self.code

    def stop(self):
        self.code = 75

    kill = stop


def write_result(folder: Folder, name: str, step: int, **values) -> None:
    workdir = folder.workdir(name)
    (workdir / "evaluation").mkdir(parents=True, exist_ok=True)
    (workdir / "evaluation" / "heldout.json").write_text(json.dumps({"format_version": 1, "step": step, **values}))
    (workdir / "usage.json").write_text(json.dumps({"format_version": 1, "host_bytes": 2**30, "device_bytes": None}))


def outcome_of(tmp_path, codes: dict[int, list[int]], retries=1, stop_after=None):
    """Runs four trials whose attempts end with the codes of their seed, 0 where none are left."""
    sweep = build(Sweep, {"configs": {"a": TINY["mamba"]}, "grid": {"train.seed": [0, 1, 2, 3]}, "retries": retries})
    folder, started = Folder(tmp_path), []

    def start(trial):
        seed = trial.settings["train.seed"]
        started.append(seed)
        waiting = codes.get(seed, [])
        return Pretended(folder, trial, waiting.pop(0) if waiting else 0)

    stopped = lambda: stop_after is not None and len(started) >= stop_after  # noqa: E731
    trials = expand(sweep, no_measure)
    return run(sweep, Listed(trials), folder, start, 2, stopped, say=lambda text: None), started, folder


def test_finished_trials_are_skipped_failed_ones_retried_a_bounded_number_of_times(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    outcome, started, folder = outcome_of(tmp_path, {0: [1], 1: [1, 1, 0], 2: [2, 0], 3: [75, 75, 75]})
    assert sorted(started) == [0, 0, 1, 1, 2, 3, 3, 3, 3], "once more after 1, not after 2, and after 75 always"
    assert outcome.finished == ["a-seed=0", "a-seed=3"] and sorted(outcome.failed) == ["a-seed=1", "a-seed=2"]
    outcome, started, _ = outcome_of(tmp_path, {})
    assert sorted(started) == [1, 2] and sorted(outcome.skipped) == ["a-seed=0", "a-seed=3"]
    assert [line["event"] for line in folder.history() if line["trial"] == "a-seed=0"] == ["started", "ended"] * 2


def test_a_trial_with_fewer_steps_than_it_should_have_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    write_result(Folder(tmp_path), "a-seed=2", step=3, loss=1.0)
    assert sorted(outcome_of(tmp_path, {})[1]) == [0, 1, 2, 3]


def test_an_interrupted_sweep_asks_its_trials_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    outcome, started, folder = outcome_of(tmp_path, {0: [None], 1: [None]}, stop_after=2)
    assert outcome.interrupted and started == [0, 1]
    assert [line["event"] for line in folder.history()] == ["started", "started", "interrupted", "interrupted"]


def test_a_trial_that_has_begun_otherwise_is_refused(tmp_path):
    trials = {steps: trials_of(set={"train.steps": steps}) for steps in (5, 9)}
    folder = Folder(tmp_path)
    folder.write_trial(trials[5][0])
    folder.write_trial(trials[9][0])  # more steps: the run goes on
    assert json.loads(folder.config("transformer").read_text())["config"]["train"]["steps"] == 9
    with pytest.raises(UserError, match="has begun with optimizer.learning_rate = 0.003, not 0.1"):
        folder.write_trial(trials_of(set={"optimizer.learning_rate": 0.1})[0])


def test_a_trial_ends_with_its_sweep():
    """Its parent is killed, and so nothing asks it to end."""
    sleeper = (
        "import os, time; from lcx.cli.trial import end_with; end_with(os.getppid())\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeper!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{int(process.stdout.readline())}/stat")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the trial outlived its sweep"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "gpus, jobs, expected",
    [("0123", 2, ["01", "23"]), ("012", 2, ["0", "1"]), ("0", 2, ["", ""]), ("0123", 1, [""]), ("", 3, ["", "", ""])],
)
def test_trials_at_a_time_have_gpus_of_their_own(gpus, jobs, expected):
    """A trial alone has what the sweep has, and so have trials that are more than the GPUs."""
    assert ["".join(share) for share in shares(list(gpus), jobs)] == expected


def test_measure_counts_as_planning_does():
    config = Config.from_dict(load_config(TINY["transformer"])).to_dict()
    assert Measure()(config, "parameters") == 885_888
