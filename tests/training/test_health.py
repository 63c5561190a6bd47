"""Bad steps: which they are, that they change nothing, and that runs end alike however often they were stopped."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.config import HealthConfig
from lcx.errors import RunFailed, UserError
from lcx.training import health
from lcx.training.checkpointing import Checkpoints
from tests.training.small_runs import Run, assert_equal, batch, program

JUDGE = HealthConfig(window=16, threshold=6.0)


def feed(losses, norms=None, state=None):
    """(which steps are bad, the health after them)."""
    step = jax.jit(functools.partial(health.judge, JUDGE))
    state, found = state or health.initial(JUDGE), []
    for index, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        bad, state, _ = step(state, jnp.int32(index), jnp.float32(loss), jnp.float32(norm))
        found.append(bool(bad))
    return found, state


def test_the_limit_is_that_of_numpy():
    values = np.random.default_rng(0).normal(3.0, 0.1, 16).astype(np.float32)
    for count in (8, 15, 16, 40):
        there = np.sort(values[: min(count, 16)])
        center = there[(len(there) - 1) // 2]
        spread = 1.4826 * np.sort(np.abs(there - center))[(len(there) - 1) // 2]
        found = health.limit(jnp.asarray(values), jnp.int32(count), 6.0)
        np.testing.assert_allclose(found, center + 6 * max(spread, 0.01 * center), rtol=1e-6)
    assert health.limit(jnp.asarray(values), jnp.int32(7), 6.0) == np.inf, "half of the window must be there"


def test_a_loss_that_has_become_zero_makes_no_spike_of_rounding():
    found = float(health.limit(jnp.zeros(16), jnp.int32(16), 30.0))
    assert 1e-3 < found < 0.1


def test_what_is_bad():
    usual = list(np.random.default_rng(1).normal(3.0, 0.05, 20))
    assert not any(feed(usual)[0])
    for loss, norm in ((np.nan, 1.0), (np.inf, 1.0), (3.0, np.nan), (6.0, 1.0), (3.0, 9.0), (-np.inf, 1.0)):
        bad, state = feed([*usual, loss, 3.0], [*[1.0] * 20, norm, 1.0])
        assert bad == [False] * 20 + [True, False], (loss, norm)
        assert state["accepted"] == 21 and state["streak"] == 0 and np.isfinite(state["losses"]).all()
    assert feed([np.nan, 9.0, 1.0])[0] == [True, False, False], "what spikes is not known yet"
    assert not any(feed([*usual, 1.0])[0]), "a loss may fall"
    bad, state = feed([*usual, 9.0, np.nan, 9.0])
    assert bad[20:] == [True] * 3 and state["streak"] == 3 and state["first_bad"] == 20


def test_norms_that_stay_large_become_usual():
    """Ten steps are skipped, as many as a rewind waits for; it would not help where losses are as before."""
    usual = list(np.random.default_rng(1).normal(3.0, 0.05, 20))
    bad, state = feed([*usual, *usual], [*[1.0] * 20, *[9.0] * 20])
    assert bad == [False] * 20 + [True] * 10 + [False] * 10
    assert state["streak"] == 0 and state["accepted"] == 10
    for loss, norm in ((9.0, 9.0), (3.0, np.inf), (np.nan, 9.0)):
        bad, state = feed([*usual, loss, *[3.0] * 10], [*[1.0] * 20, norm, *[9.0] * 10])
        assert bad[20:] == [True] * 11 and state["streak"] == 11 and state["accepted"] == 20, (loss, norm)
        assert not any(feed([3.0] * 2, state=state)[0]) and not feed([3.0], state=state)[1]["losses_bad"]


def test_indices_that_are_stepped_over():
    known = health.step_over(jax.device_get(health.initial(JUDGE)), [[4, 6], [6, 7], [9, 10]])
    assert known["over"][:3].tolist() == [[4, 7], [9, 10], [0, 0]]
    follow = jax.jit(health.index_from)
    for index, expected in ((0, 0), (3, 3), (4, 7), (6, 7), (7, 7), (9, 10), (10, 10)):
        assert health.index_from(np.int32(index), known) == expected == follow(jnp.int32(index), known)
    with pytest.raises(UserError, match="32 stretches of its data, not 41"):
        health.step_over(known, [[10 * i, 10 * i + 2] for i in range(1, 41)])


FAULTS = {2: "nan", 12: "spike", 17: "spike", 18: "nan", 19: "spike"}


def test_faults_are_skipped_and_stepped_over_alike_in_runs_that_were_stopped(tmp_path):
    """A NaN, a spike, and a streak that makes the run rewind; also with stops before, in and after the streak."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, stopped = Run(tmp_path / "a", FAULTS), Run(tmp_path / "b", FAULTS, stops=(4, 18, 21))
    states = whole.whole(), stopped.whole()
    assert_equal(*states)
    assert stopped.stops == [] and any("Steps 18 to 20 were all bad" in text for text in whole.said)
    assert states[0].step == 24 and states[0].data_index == 27
    lines = whole.lines()
    assert lines == stopped.lines()
    logged = {line["step"]: (line["data_index"], line["skipped"]) for line in lines}
    assert logged == {3: (2, 1), 4: (3, 0), 8: (7, 0), 12: (11, 0), 13: (12, 1), 16: (15, 0), 20: (22, 0), 24: (26, 0)}
    assert lines[0]["loss"] is None and lines[0]["grad_norm"] is None
    quarantined = whole.lines("quarantine.jsonl")
    assert quarantined == stopped.lines("quarantine.jsonl")
    assert [line["data_index"] for line in quarantined] == [2, 12, 17, 18, 19]
    assert quarantined[1]["rows"] == [{"source": "counts", "documents": ["from 12"]}]
    assert quarantined[1]["grad_norm"] > quarantined[1]["grad_norm_limit"] > 0


def test_a_skipped_step_changes_the_counters_alone():
    with program().on_mesh():
        step, state = jax.jit(program().step), program().create()
        state, _ = step(state, program().put(batch(0, None)))
        after, metrics = step(state, program().put(batch(1, "nan")))
    assert metrics["skipped"] == 1 and after.step == 2 and after.data_index == 2
    assert_equal((after.params, after.opt_state), (state.params, state.opt_state))


def test_a_rewind_that_was_cut_short_is_finished(tmp_path, monkeypatch):
    """Killed when it was written down, with the checkpoint of the streak still there."""
    faults, changes = {7: "nan", 8: "nan", 9: "nan", 10: "nan"}, {"checkpoint": {"every": 2}, "health": {"patience": 4}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = Run(tmp_path / "a", faults, **changes).whole()
    cut = Run(tmp_path / "b", faults, **changes)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoints, "remove_after", _kill)
        cut.part()
    steps = {path.name for path in (tmp_path / "b" / "checkpoints").glob("*.json")}
    assert steps == {f"{step}.manifest.json" for step in (6, 8, 10)}, "two made in the streak, and the one before it"
    assert_equal(cut.whole(), expected)
    assert cut.lines() == Run(tmp_path / "a", faults).lines()
    assert json.loads((tmp_path / "b" / "rewinds.json").read_text()) == {
        "format_version": 1,
        "rewinds": [{"steps": [8, 11], "indices": [7, 11]}],
    }


def _kill(*_):
    raise KeyboardInterrupt


def test_a_run_that_stays_bad_gives_up_with_a_report(tmp_path):
    run = Run(tmp_path, {index: "nan" for index in range(6, 40)}, health={"max_rewinds": 1})
    with pytest.raises(RunFailed, match=r"steps 7 to 9 were all bad, after 1 rewinds.*failure.json"):
        run.part()
    report = json.loads((tmp_path / "failure.json").read_text())
    assert report["rewinds"] == [{"steps": [7, 9], "indices": [6, 9]}] and report["steps"] == [7, 9]
    assert [line["data_index"] for line in report["skipped"]] == [6, 7, 8, 9, 10, 11]
    assert RunFailed.exit_code == 1
