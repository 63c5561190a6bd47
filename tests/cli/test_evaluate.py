"""Suites through the command line: inside training, on checkpoints, on variants, while a run goes on, and compared."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cli.main import main
from lcx.cli.variant import open_trained
from lcx.evaluation.policies import apply_policy
from lcx.evaluation.streaming import row_losses, stream
from tests.evaluation.test_policies import bound_holds

RUN = [
    "--config=configs/samba.py:size=tiny,sequence_length=32",
    "--config.model.d_model=16",
    "--config.model.periods=1",
    "--config.model.pattern=mamba swa",
    "--config.model.mixers.swa.num_heads=2",
    "--config.model.mixers.swa.num_kv_heads=2",
    "--config.model.mixers.swa.window=8",
    "--config.train.steps=5",
    "--config.checkpoint.every=2",
    "--config.evaluation.max_rows=8",
    "--config.evaluation.every=2",
    "--config.evaluation.suites=perplexity",
    "--config.evaluation.chunk_size=32",
    "--config.evaluation.options.perplexity.lengths=[32,64]",
    "--config.evaluation.options.perplexity.whole=0",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Forty short documents, two of them held out by the hash of their names."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number}: " + "a line of words\n" * (20 + number))
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """The workdir of a run of five steps on eight devices, evaluated after every second one and after the last."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *RUN, f"--config.data.sources[0].path={corpus}", f"--workdir={workdir}"]) == 0
    return workdir


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def evaluate(run: Path, *flags: str) -> int:
    return main(["evaluate", f"--workdir={run}", *flags])


@pytest.mark.slow
def test_suites_run_inside_training(run):
    found = read(run / "evaluation" / "perplexity.json")
    assert found["format_version"] == 1 and found["step"] == 5 and found["options"] == {"lengths": [32, 64], "whole": 0}
    assert [past["step"] for past in found["history"]] == [2, 4, 5]
    assert found["history"][2]["scalars"] == found["scalars"] and 0 < found["scalars"]["bits_at_64"] < 9
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line.get("perplexity/bits_at_32") for line in lines}
    for past in found["history"][:2]:
        assert logged[past["step"]] == past["scalars"]["bits_at_32"]
    assert (run / "evaluation" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    events = b"".join(path.read_bytes() for path in (run / "tensorboard" / "evaluation").iterdir())
    assert b"perplexity/bits_at_64" in events and b"perplexity/bits_by_position" in events


@pytest.mark.slow
def test_a_checkpoint_gives_what_the_loop_gave(run, tmp_path):
    """On one device, of the step that is asked for."""
    assert evaluate(run, "--step=2", f"--out={tmp_path}") == 0
    in_loop = read(run / "evaluation" / "perplexity.json")["history"][0]
    found = read(tmp_path / "perplexity.json")
    assert found["step"] == 2 and found["scalars"] == pytest.approx(in_loop["scalars"], abs=1e-5)


@pytest.mark.slow
def test_following_ends_with_the_run_and_an_older_step_joins_the_history(run, tmp_path, capsys):
    assert evaluate(run, "--follow", f"--out={tmp_path}") == 0
    assert "step 5" in capsys.readouterr().out
    assert evaluate(run, "--step=2", f"--out={tmp_path}") == 0
    found = read(tmp_path / "perplexity.json")
    assert found["step"] == 5 and [past["step"] for past in found["history"]] == [2, 5]
    assert found["scalars"] == found["history"][1]["scalars"] != found["history"][0]["scalars"]


@pytest.mark.slow
def test_following_a_run_that_goes_on(corpus, tmp_path):
    """Begun before the run is; every checkpoint that it sees is evaluated, and it ends with the last."""
    workdir, out = tmp_path / "run", tmp_path / "found"
    source = f"--config.data.sources[0].path={corpus}"
    begin = lambda verb, *flags: subprocess.Popen([sys.executable, f"scripts/{verb}.py", *flags])  # noqa: E731
    with begin("evaluate", f"--workdir={workdir}", "--follow", f"--out={out}") as following:
        trained = [*RUN, source, "--config.train.steps=600", "--config.evaluation.every=0", f"--workdir={workdir}"]
        with begin("train", *trained) as training:
            assert training.wait(timeout=600) == 0
        assert following.wait(timeout=600) == 0
    steps = [past["step"] for past in read(out / "perplexity.json")["history"]]
    assert len(steps) > 1 and steps[-1] == 600 and all(step % 2 == 0 for step in steps)


@pytest.mark.slow
def test_an_export_gives_what_its_run_gave(run, corpus, tmp_path):
    exported, out = tmp_path / "export", tmp_path / "found"
    options = [f"perplexity.files={corpus}", "perplexity.lengths=[32,64]", "perplexity.whole=0"]
    options += ["passkey.lengths=[256]"]
    flags = [f"--set=evaluation.options.{option}" for option in options]
    assert main(["export", f"--workdir={run}", f"--out={exported}", "--noverify"]) == 0
    assert evaluate(run, "--suite=perplexity", *flags, f"--out={out}") == 0
    assert evaluate(exported, "--suite=perplexity,passkey", *flags) == 0
    found, expected = read(exported / "evaluation" / "perplexity.json"), read(out / "perplexity.json")
    assert found["step"] == 5 and found["scalars"] == pytest.approx(expected["scalars"], abs=1e-5)
    assert read(exported / "evaluation" / "passkey.json")["scalars"]["accuracy"] == 0  # nobody learns it in five steps


@pytest.mark.slow
def test_a_variant_has_a_file_of_its_own(run):
    flags = ["--set=model.mixers.swa.window=2", "--set=evaluation.options.perplexity.documents=1"]
    assert evaluate(run, "--suite=perplexity", *flags) == 0
    trained = read(run / "evaluation" / "perplexity.json")
    variant = read(run / "evaluation" / "perplexity@swa.window=2.json")
    assert variant["variant"] == "swa.window=2" and variant["options"]["documents"] == 1
    assert variant["scalars"]["bits_at_32"] != trained["scalars"]["bits_at_32"]
    assert trained["options"] == {"lengths": [32, 64], "whole": 0}


@pytest.mark.slow
def test_runs_are_compared_on_one_page(run, tmp_path):
    page = tmp_path / "page.html"
    assert main(["evaluate", f"--compare={run}", f"--out={page}"]) == 0
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "<h2>perplexity</h2>" in text and text.count("<svg") == 2
    assert "<td>run</td>" in text and "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--suite=passkeys"], 'unknown suite "passkeys": did you mean "passkey"?'),
        (["--suite=passkey", "--set=evaluation.options.passkey.deptsh=3"], 'did you mean "depths"?'),
        (["--set=model.d_model=32"], "--set makes a model with other parameters (embedding/table is [256, 16]"),
        (["--set=model.mixers.swa.windw=2"], 'did you mean "window"?'),
        (["--set=model.norm_eps"], "needs a value: --set model.norm_eps=VALUE."),
        (["--step=3"], "has no checkpoint of step 3; there are: 2, 4, 5."),
        (["--cache=h2o:budget=8"], "no layer of this model has full attention"),
        (["--follow", "--step=2"], "leave out --step"),
        (["--set=evaluation.options.perplexity.lengths=[9999]"], "no document has more than 9999 tokens"),
        (["--compare=nowhere"], "leave out --workdir and --suite"),
        (["--suite="], None),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, capsys, flags, sentence):
    if sentence is None:
        assert evaluate(run, *flags, f"--out={tmp_path}") == 0  # the suites of the config
        return
    assert evaluate(run, *flags, f"--out={tmp_path}") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_wrong_suite_stops_a_run_before_it_begins(corpus, tmp_path, capsys):
    arguments = [*RUN, "--config.evaluation.suites=perplexitee", f"--config.data.sources[0].path={corpus}"]
    assert main(["train", *arguments, f"--workdir={tmp_path / 'run'}"]) == 2
    assert 'did you mean "perplexity"' in capsys.readouterr().err
    assert main(["evaluate", f"--compare={tmp_path}"]) == 2
    assert "was not evaluated" in capsys.readouterr().err


@pytest.mark.slow
def test_policies_on_trained_attention(corpus, tmp_path):
    """The bound of a Quest page is above the scores of all its keys, and with room for everything nothing changes."""
    attention = ["--config=configs/transformer.py:size=tiny,sequence_length=64", "--config.model.d_model=32"]
    steps = ["--config.train.steps=200", "--config.optimizer.learning_rate=1e-2", "--config.evaluation.max_rows=8"]
    workdir, source = tmp_path / "run", f"--config.data.sources[0].path={corpus}"
    assert main(["train", *attention, *steps, source, f"--workdir={workdir}"]) == 0
    trained = open_trained(workdir)
    tokens = np.frombuffer((corpus / "7.txt").read_bytes()[:193], np.uint8)[None].astype(np.int32)
    *_, piece = stream(trained.model, tokens, 64)
    cache = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(piece.state) if "'key'" in str(path[-1])]
    for number, key in enumerate(jnp.concatenate(cache)):  # of a layer, as it is kept: [batch, time, kv_heads, K]
        bound_holds(10 * jax.random.normal(jax.random.key(number), (1, key.shape[2], 3, key.shape[3])), key)
        bound_holds(key[:, -1][:, :, None], key)
    assert number + 1 == trained.config.model.periods and key.shape[1] == 192
    expected = row_losses(trained.model, tokens, 64)
    assert expected.mean() < 0.5 * np.log(256), "it has learned something"
    for policy in ("sink_window", "lm_infinite", "h2o", "spatten", "quest"):
        found = row_losses(apply_policy(trained.model, f"{policy}:budget=256"), tokens, 64)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
