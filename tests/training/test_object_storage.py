"""A workdir where files are put, listed, read and removed, and nothing else: no appends, locks or renames."""

import builtins
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lcx.cli.main import main
from lcx.errors import UserError
from lcx.files import JsonLines, cut_lines, line_files, read_lines, write_json
from lcx.training import workdir as workdirs
from lcx.training.checkpointing import Checkpoints
from lcx.training.heartbeats import held
from lcx.training.workdir import open_workdir


class Refused(OSError):
    """Object storage cannot do this."""


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Path:
    """A folder that lcx takes for object storage, and that refuses what object storage does not know.

    orbax, which writes to a bucket in its own way, takes it for a local folder and may rename in it.
    """
    folder = tmp_path / "bucket"
    folder.mkdir()
    below = lambda path: str(path).startswith(str(folder))  # noqa: E731

    def refuse(function):
        def refusing(path, *args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            if below(path) and caller.startswith("lcx"):
                raise Refused(f"{function.__name__} of {path} by {caller}")
            return function(path, *args, **kwargs)

        return refusing

    def opening(path, mode="r", *args, open=builtins.open, **kwargs):
        if isinstance(path, str | os.PathLike) and below(path) and set(mode) & set("a+"):
            raise Refused(f"{path} opened for {mode}")
        return open(path, mode, *args, **kwargs)

    local = type(epath.Path(folder))
    monkeypatch.setattr(builtins, "open", opening)
    for owner, name in ((os, "replace"), (os, "rename"), (os, "link"), (local, "rename"), (local, "replace")):
        monkeypatch.setattr(owner, name, refuse(getattr(owner, name)))
    for name in ("lcx.files", "lcx.training.checkpointing", "lcx.training.telemetry", "lcx.training.workdir"):
        monkeypatch.setattr(importlib.import_module(name), "is_local", lambda path: not below(path))
    monkeypatch.setattr(workdirs, "HELD", 1.0)
    return folder


def test_the_storage_refuses(storage):
    with pytest.raises(Refused):
        open(storage / "a", "a")
    write_json(storage / "a", {})  # by one put: a local one renames
    assert os.listdir(storage) == ["a"]


def test_lines_lie_in_numbered_parts(storage, monkeypatch):
    monkeypatch.setattr(JsonLines, "PART", 3)
    path = epath.Path(storage / "metrics.jsonl")
    for start in (0, 4):
        lines = JsonLines(path)
        for step in range(start, start + 4):
            lines.append({"step": step})
        lines.close()
    names = [f"metrics.jsonl.{number:05}" for number in range(4)]
    assert [file.name for file in line_files(path)] == names == sorted(os.listdir(storage))
    assert [line["step"] for line in read_lines(path)] == list(range(8))
    cut_lines(path, lambda line: line["step"] < 5)
    assert [line["step"] for line in read_lines(path)] == list(range(5))


def test_checkpoints_come_and_go_and_are_set_aside(storage):
    state = lambda step: {"w": jnp.full((8, 8), step, jnp.float32)}  # noqa: E731
    checkpoints = Checkpoints(storage / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.close()
    folder = storage / "checkpoints"
    assert sorted(os.listdir(folder)) == ["2", "2.manifest.json", "3", "3.manifest.json"]
    (folder / "3" / "_METADATA").write_text("{}")
    abstract = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=state(0)["w"].sharding)}
    said = []
    checkpoints = Checkpoints(folder, keep=2, say=said.append)
    step, restored = checkpoints.restore(abstract)
    checkpoints.save(3, state(3))  # again
    checkpoints.close()
    assert step == 2 and np.all(np.asarray(restored["w"]) == 2) and "3.damaged" in said[0]
    names = ["2", "2.manifest.json", "3", "3.damaged", "3.damaged.manifest.json", "3.manifest.json"]
    assert sorted(os.listdir(folder)) == names and (folder / "3.damaged" / "_METADATA").read_text() == "{}"


def test_a_heartbeat_stands_for_the_lock(storage):
    """It refuses a second run while the first lives, and a run that was killed holds nothing."""
    with open_workdir(storage, {}, {}):
        assert os.listdir(storage / "heartbeats") == ["run"]
        with pytest.raises(UserError, match="in use by another run"), open_workdir(storage, {}, {}):
            pass
        (beat,) = (storage / "heartbeats").iterdir()
        killed = beat.read_text()
    assert not os.listdir(storage / "heartbeats"), "one that ends in peace holds nothing"
    beat.write_text(killed)
    with open_workdir(storage, {}, {}):
        assert json.loads((storage / "config.json").read_text())["config"] == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_workdir_is_taken_over_ends(storage, capfd):
    left = threading.Event()

    def leave(code):
        assert code == 2
        left.set()
        raise SystemExit  # of the thread

    with held(epath.Path(storage / "beat"), 0.3, leave):
        (storage / "beat").write_text("another 1")
        assert left.wait(5)
    assert "was taken over by another run" in capfd.readouterr().err
    assert (storage / "beat").exists(), "it is the other run's"


@pytest.mark.slow
def test_a_whole_run(storage, tmp_path, capsys):
    """Trains, is resumed with a damaged checkpoint, and is read."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"document {number}: " + "a line of words\n" * (20 + number))
    arguments = [
        "train",
        "--config=configs/samba.py:size=tiny,sequence_length=64",
        "--config.model.pattern=mlp",
        "--config.model.d_model=16",
        "--config.checkpoint.every=2",
        "--config.logging.every=1",
        "--config.optimizer.schedule=constant",
        f"--config.data.sources[0].path={corpus}",
        f"--workdir={storage}",
    ]
    assert main([*arguments, "--config.train.steps=4"]) == 0
    (storage / "checkpoints" / "4" / "_METADATA").write_text("{}")
    began = time.monotonic()
    assert main([*arguments, "--config.train.steps=6"]) == 0
    assert time.monotonic() - began < 60
    said = capsys.readouterr().out
    assert "step 4 is damaged" in said and "going on from step 2" in said
    assert [line["step"] for line in read_lines(storage / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert main(["generate", f"--workdir={storage}", "--prompt=a line", "--max_tokens=4"]) == 0
    assert not [path for path in storage.rglob("*") if path.name.endswith(".tmp") or path.name == ".lock"]
