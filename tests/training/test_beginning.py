"""What a run begins with, and which of its checkpoints stay."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lcx.errors import UserError
from lcx.training.beginning import find_fork
from lcx.training.checkpointing import Checkpoints
from tests.training.small_runs import Run, assert_equal


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Run:
    """A run of 24 steps with checkpoints of 20 and 24, that has skipped index 2 and stepped over 17 to 19."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    folder.mkdir()
    run = Run(folder, {2: "nan", 17: "nan", 18: "nan", 19: "nan"})
    run.whole()
    return run


def fork(source: Run, folder, **options) -> Run:
    folder.mkdir()
    return Run(folder, source.faults, checkpoint=options)


def test_a_fork_goes_on_as_the_run_it_was_forked_from(source, tmp_path):
    whole = source.whole()
    forked = fork(source, tmp_path / "forked", fork=f"{source.folder}@20", every=100)
    state = forked.whole()
    assert_equal(state, whole)
    assert state.data_index == 27, "what the source steps over, its fork does too"
    names = {path.name for path in (tmp_path / "forked" / "checkpoints").glob("*.json")}
    assert names == {"20.manifest.json", "24.manifest.json"}, "the state it began with is saved at once"
    assert find_fork(str(source.folder)) == find_fork(f"{source.folder}@24")


def test_a_fork_of_parts(source, tmp_path):
    """Another optimizer's statistics, or none of the run but its parameters."""
    saved = source.restored(20)
    for part, step, data_index in (("no_optimizer", 20, 23), ("parameters", 0, 0)):
        forked = fork(source, tmp_path / part, fork=f"{source.folder}@20", fork_state=part)
        forked.stops = [data_index]
        forked.until_a_stop()
        state = forked.restored(step)
        assert_equal(state.params, saved.params)
        assert (state.step, state.data_index) == (step, data_index)
        fresh = jax.device_get(forked.program.create()).opt_state
        assert_equal(state.opt_state, fresh)
        if part == "no_optimizer":
            assert_equal(state.health, saved.health)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{}@21", "no checkpoint of step 21; there are: 20, 24"),
        ("{}/nowhere", "there is no checkpoint in"),
        ("{}/nowhere@3", "has no checkpoint of step 3; there are: none"),
    ],
)
def test_a_fork_of_nothing_is_refused(source, tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        fork(source, tmp_path / "run", fork=spec.format(source.folder)).whole()


def test_another_optimizer_is_named(source, tmp_path):
    forked = fork(source, tmp_path / "run", fork=str(source.folder))
    abstract = dataclasses.replace(forked.program.abstract, opt_state=())
    forked.program = dataclasses.replace(forked.program, abstract=abstract)
    with pytest.raises(UserError, match=r"of another optimizer: opt_state/.*checkpoint.fork_state"):
        forked.whole()


def kept(folder, scores: dict[int, float | None], **options) -> list[int]:
    """The steps that stay of so many saves."""
    checkpoints = Checkpoints(folder, **options)
    for step, score in scores.items():
        checkpoints.save(step, {"w": np.float32([step])}, score)
    checkpoints.close()
    steps = checkpoints.steps()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(map(str, steps))
    return steps


def test_what_stays(tmp_path):
    scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 2.0, 6: float("nan"), 7: 3.0}
    assert kept(tmp_path / "a", scores, keep=2) == [6, 7]
    assert kept(tmp_path / "b", scores, keep=1, keep_every=3) == [3, 6, 7]
    assert kept(tmp_path / "c", scores, keep=1, keep_best=2) == [2, 5, 7]
    assert kept(tmp_path / "d", scores, keep=1, keep_every=4, keep_best=1) == [2, 4, 7]
    manifest = json.loads((tmp_path / "d" / "2.manifest.json").read_text())
    assert manifest["score"] == 1.0 and manifest["seconds"] > 0


def test_the_checkpoint_before_a_streak_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a", keep=1)
    for step, in_streak in ((1, False), (2, False), (3, True), (4, True)):
        checkpoints.save(step, {"w": np.float32([step])}, in_streak=in_streak)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.save(5, {"w": np.float32([5])})
    checkpoints.close()
    assert checkpoints.steps() == [5]
