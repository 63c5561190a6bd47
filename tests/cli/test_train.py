"""Whole runs through the command line: what a user sees, resumes and gets wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import lcx
from lcx.cli.main import main

TINY = [
    "--config=configs/samba.py:size=tiny,sequence_length=64",
    "--config.model.d_model=32",
    "--config.model.pattern=mamba swa mlp",
    "--config.model.mixers.swa.num_heads=4",
    "--config.model.mixers.swa.num_kv_heads=4",
    "--config.model.mixers.mlp.d_ff=48",
    "--config.train.steps=6",
    "--config.checkpoint.every=2",
    "--config.logging.every=1",
    "--config.evaluation.max_rows=8",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Forty short documents, two of them held out by the hash of their names."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"document {number}: " + "a line of words\n" * (20 + number))
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    """The workdir of a run of six steps."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *TINY, f"--config.data.sources[0].path={corpus}", f"--workdir={workdir}"]) == 0
    return workdir


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_workdir_promises(finished):
    logged = lines(finished)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert [line["data_index"] for line in logged] == [0, 1, 2, 3, 4, 5]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert json.loads((finished / "config.json").read_text())["format_version"] == 1
    steps = {path.name for path in (finished / "checkpoints").iterdir()}
    assert steps == {"2", "4", "6", "2.manifest.json", "4.manifest.json", "6.manifest.json"}
    heldout = json.loads((finished / "evaluation" / "heldout.json").read_text())
    assert heldout["step"] == 6 and heldout["tokens"] > 0
    assert heldout["bits_per_token"] == pytest.approx(heldout["loss"] / 0.6931471805599453)
    assert (finished / "evaluation" / "heldout.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "evaluation" / "sample.txt").stat().st_size > 64
    assert any((finished / "tensorboard").iterdir())


def test_steps_may_grow_and_the_run_goes_on(finished, corpus, tmp_path, capsys):
    workdir = tmp_path / "grown"
    subprocess.run(["cp", "-r", finished, workdir], check=True)
    arguments = [*TINY, "--config.train.steps=8", f"--config.data.sources[0].path={corpus}", f"--workdir={workdir}"]
    assert main(["train", *arguments]) == 0
    assert "going on from step 6" in capsys.readouterr().out
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines(workdir)[:6] == lines(finished)


def test_load_gives_the_model_that_was_trained(finished):
    model, tokenizer = lcx.load(finished)
    logits, _, _ = jax.jit(model)(tokenizer.encode("a line of words")[None])
    assert logits.shape == (1, 15, 256)


def test_generate_streams_text(finished, capsys):
    arguments = ["generate", f"--workdir={finished}", "--prompt=a line", "--max_tokens=12", "--seed=3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("a line") and len(text) > len("a line\n")
    assert main(arguments) == 0
    assert capsys.readouterr().out == text
    assert main(["generate", f"--workdir={finished}", "--prompt="]) == 2
    assert capsys.readouterr().err == "error: --prompt is empty: give at least one character to go on from.\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.train.stepz=5"], 'unknown key "train.stepz": did you mean "steps"?'),
        (["--config=configs/samba.py:size=421mb"], 'unknown size "421mb": did you mean "421m"?'),
        (["--config=configs/samba.py:sise=421m"], 'did you mean "size"?'),
        (["--config=configs/samab.py"], 'config file "configs/samab.py" is not there'),
        (["--config.model.mixers.swa.window=0"], "model.mixers.swa.window"),
        (["--config.model.mixers.swa.num_heads=7"], "model.mixers.swa: num_heads=7 does not divide"),
        (["--config.data.sources[0].path=/no/such/place"], "/no/such/place"),
        (["--config.train.steps=0"], "train.steps"),
        (["--config.optimizer.name=adam"], 'unknown optimizer "adam": did you mean "adamw"?'),
        (["--config.model.mixers.mamba.backend=tritn"], "model.mixers.mamba: backend: unknown name 'tritn'"),
        (["--config.data.sources[0].format=parquets"], 'unknown format "parquets": did you mean "parquet"?'),
        (["--config.data.tokenizer=gpt2"], 'unknown tokenizer "gpt2"'),
        (["--config.train.stages=[{'step': 5}, {'step': 5}]"], "train.stages[1].step = 5 goes backwards"),
        (["--config.train.stages=[{'step': 5, 'weights': {'c': 1}}]"], 'no source is called "c"'),
        (["--config.data.sources[0].weight=nan"], "data.sources[0].weight must be a number"),
        (["--config.model.vocab_size=100"], "model.vocab_size is 100"),
        (["--config.train.batch_size=9", "--config.mesh.data=8"], "train.batch_size=9 does not divide"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "never"
    assert main(["train", *TINY, *arguments, f"--workdir={workdir}"]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and found.count("\n") == 1 and message in found, found
    assert not workdir.exists(), "a mistake leaves nothing behind"


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty.txt").write_text("")
    arguments = [f"--config.data.sources[0].path={tmp_path / 'corpus'}", f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *TINY, *arguments]) == 2
    assert "the corpus is empty" in capsys.readouterr().err


def test_another_models_workdir_is_refused_and_keeps_all(finished, corpus, capsys):
    before = (finished / "config.json").read_bytes()
    arguments = [*TINY, f"--config.data.sources[0].path={corpus}", "--config.model.mixers.mamba.state_size=8"]
    assert main(["train", *arguments, f"--workdir={finished}"]) == 2
    message = capsys.readouterr().err
    assert "holds another model's run" in message and "model.mixers.mamba.state_size" in message
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; the next test covers a path that nobody can")
def test_an_unwritable_workdir_is_refused(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main(["train", *TINY, f"--workdir={tmp_path / 'closed' / 'run'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_workdir_below_a_file_is_refused(tmp_path, corpus, capsys):
    (tmp_path / "file").write_text("")
    arguments = [f"--config.data.sources[0].path={corpus}", f"--workdir={tmp_path / 'file' / 'run'}"]
    assert main(["train", *TINY, *arguments]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_workdir_in_use_is_refused(finished, corpus):
    """By another process that holds its lock."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(finished / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        holder.stdout.readline()
        arguments = [*TINY, f"--config.data.sources[0].path={corpus}", f"--workdir={finished}"]
        command = [sys.executable, "scripts/train.py", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    finally:
        holder.kill()
        holder.wait()
    assert found.returncode == 2, found.stderr
    assert "is in use by process" in found.stderr and "Traceback" not in found.stderr


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
