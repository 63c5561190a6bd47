"""A run whose documents begin with a start token, and what its model writes, after one prompt and after many."""

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lcx
from lcx.cli.main import main
from lcx.data.sources import is_held_out

CONFIG = [
    "--config=configs/sink.py:size=tiny,form=token,window=16,sequence_length=64",
    "--config.model.d_model=32",
    "--config.model.periods=1",
    "--config.model.mixers.attention.num_heads=4",
    "--config.model.mixers.mlp.d_ff=48",
    "--config.train.steps=2",
    "--config.evaluation.max_rows=0",
]
PROMPTS = ["a line", "document 7: a line of words", "\u00e9t\u00e9"]


def content(number: int) -> bytes:
    return f"document {number}: ".encode() + b"a line of words\n" * (20 + number)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_bytes(content(number))
    return folder


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory) -> Path:
    """Of a run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *CONFIG, f"--config.data.sources[0].path={corpus}", f"--workdir={workdir}"]) == 0
    return workdir


def written(capsys, workdir: Path, *flags: str) -> str:
    """What the verb prints, greedily."""
    assert main(["generate", f"--workdir={workdir}", "--max_tokens=9", "--temperature=0", *flags]) == 0
    return capsys.readouterr().out


def test_a_run_with_a_start_token_scores_bytes(workdir, corpus):
    """All of them, each document's first too, which only a start token makes possible; the yardstick likewise."""
    report = json.loads((workdir / "evaluation" / "heldout.json").read_text())
    names = [path.name for path in corpus.iterdir() if is_held_out(path.name)]
    assert report["tokens"] == sum(len((corpus / name).read_bytes()) for name in names) > 0
    assert 0 < report["bigram_bits_per_token"] < 2 < report["bits_per_token"] < math.log2(264) + 1
    sample = (workdir / "evaluation" / "sample.txt").read_bytes()
    assert any(sample.startswith((corpus / name).read_bytes()[:63]) for name in names)  # and one start token


def test_load_gives_a_tokenizer_with_the_start_token(workdir):
    model, tokenizer = lcx.load(workdir)
    assert tokenizer.encode("ab").tolist() == [256, 97, 98]
    assert model(tokenizer.encode("ab")[None])[0].shape == (1, 3, 264)


def test_prompts_begin_with_the_start_token(workdir, capsys, monkeypatch):
    seen = []

    def spied(model, prompts, *rest, **settings):
        seen.extend(prompts)
        return iter(np.array([[97], [256], [98]], np.int32))

    monkeypatch.setattr("lcx.models.generate.generate", spied)
    assert written(capsys, workdir, "--prompt=ab") == "abab\n"
    assert written(capsys, workdir, "--prompt=") == "ab\n"  # a document from its beginning
    assert [prompt.tolist() for prompt in seen] == [[256, 97, 98], [256]]


def test_many_prompts_are_written_one_after_the_other(workdir, tmp_path, capsys):
    """As each alone, whatever the chunks and the line ends."""
    alone = [written(capsys, workdir, f"--prompt={prompt}") for prompt in PROMPTS]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, PROMPTS, strict=True))
    expected = "".join(f"=== {number} of 3 ===\n{text}" for number, text in enumerate(alone, start=1))
    file = tmp_path / "prompts.txt"
    for ends, flags in (("\n", []), ("\r\n", ["--chunk_size=4"]), ("\n", ["--chunk_size=0"])):
        file.write_bytes(ends.join([*PROMPTS, ""]).encode())
        assert written(capsys, workdir, f"--prompts_file={file}", *flags) == expected
    file.write_bytes("\n".join(PROMPTS).encode())
    assert written(capsys, workdir, f"--prompts_file={file}") == expected


def test_standard_input_is_a_prompt(workdir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a line")))
    assert written(capsys, workdir, "--prompt=-") == written(capsys, workdir, "--prompt=a line")


@pytest.mark.parametrize(
    "content, flags, message",
    [
        (b"one", ["--prompt=two"], "--prompt and --prompts_file exclude each other: give one of them."),
        (None, [], "--prompts_file: cannot read .*prompts.txt: No such file or directory."),
        (b"", [], "--prompts_file: .*prompts.txt is empty: write a prompt in each line."),
        (b"\n", [], "--prompts_file: .*prompts.txt is empty: write a prompt in each line."),
        (b"one\n\r\ntwo\n", [], "--prompts_file: line 2 of .*prompts.txt is empty: each line is a prompt."),
        (b"one\n\n", [], "--prompts_file: line 2 of .*prompts.txt is empty: each line is a prompt."),
        (b"one", ["--chunk_size=-1"], "lcx generate: flag --chunk_size=-1: .*"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, capsys, content, flags, message):
    """Before a model is looked for: there is none."""
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["generate", f"--workdir={tmp_path / 'none'}", f"--prompts_file={file}", *flags]) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "--config.data.start_token=255",
            "data.start_token=255 is an ordinary byte: with data.tokenizer=bytes use",
        ),
        ("--config.data.start_token=-1", "data.start_token must be at least 0"),
        ("--config.data.start_token=264", "set it to at least that"),
        ("--config.train.sequence_length=1", "train.sequence_length must be at least 2 with data.start_token=256"),
    ],
)
def test_start_tokens_that_cannot_be(argument, message, corpus, tmp_path, capsys):
    flags = [f"--config.data.sources[0].path={corpus}", argument, f"--workdir={tmp_path / 'never'}"]
    assert main(["train", *CONFIG, *flags]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and found.count("\n") == 1 and message in found, found
    assert not (tmp_path / "never").exists()
