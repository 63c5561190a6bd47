"""Timing by turns: whose turn, what is made of the seconds, and the verb around it."""

import json
import time

import jax
import numpy as np
import pytest

from lcx.benchmarks import kernels
from lcx.benchmarks.harness import Result, Timing, markdown, ratio, take_turns
from lcx.cli import benchmark
from lcx.cli.main import main
from lcx_kernels.selective_scan import selective_scan


def test_contestants_take_turns():
    calls = []
    timings = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3  # once each before anything is timed
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_a_slower_contestant_is_slower():
    timings = take_turns({"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}, rounds=3)
    assert ratio(timings["slow"], timings["fast"]) > 3


def test_what_slows_a_whole_round_cancels():
    ours, theirs = Timing((1.0, 10.0, 1.0, 2.0)), Timing((3.0, 30.0, 3.0, 6.0))
    assert ratio(theirs, ours) == 3
    assert ours.median == 1.5 and ours.spread > 1


def test_the_report_says_what_does_not_hold():
    table = markdown("kernels", [Result("a", 3.7, "x", "at least 3.5", True), Result("b", 1, "x", "below 1", False)])
    assert "| a | 3.7 x | at least 3.5 | yes |" in table and "| b | 1 x | below 1 | **no** |" in table


def test_the_verb_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    part = lambda rounds: [Result("a", float(rounds), "x", details={"s": 1.0})]  # noqa: E731
    monkeypatch.setitem(benchmark.SUITES, "kernels", lambda values: [part])
    assert main(["benchmark", "kernels", "--rounds=4", f"--out={tmp_path}/report"]) == 0
    assert "| a | 4 x |" in capsys.readouterr().out
    record = json.loads((tmp_path / "report" / "kernels.json").read_text())
    assert record["results"][0]["value"] == 4 and record["machine"]["cores"] >= 1
    assert "| a | 4 x |" in (tmp_path / "report" / "kernels.md").read_text()


def test_a_report_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SUITES, "kernels", lambda values: [])
    (tmp_path / "file").write_text("")
    assert main(["benchmark", "kernels", f"--out={tmp_path}/file"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["kernel"], ["kernels", "train"]])
def test_an_unknown_suite_is_named(words, capsys):
    assert main(["benchmark", *words]) == 2
    assert "say which suite" in capsys.readouterr().err


def test_the_peer_computes_the_same():
    arguments = {
        name: array[:, :40] if array.ndim == 3 else array for name, array in kernels.scan_arguments(1, 64).items()
    }
    found, expected = jax.jit(lambda given: (kernels.associative(**given), selective_scan(**given)[0]))(arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
