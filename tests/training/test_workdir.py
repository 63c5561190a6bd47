import copy
import json
import os
import signal
import subprocess
import sys

import pytest

from lcx.errors import UserError
from lcx.training.workdir import open_workdir

CONFIG = {
    "model": {"family": "samba", "d_model": 64, "mixers": {"swa": {"window": 32}}},
    "data": {"sources": [{"name": "python", "path": "stdlib"}], "workers": 2, "seed": 0},
    "train": {"steps": 100, "seed": 0},
    "optimizer": {"betas": (0.9, 0.95)},
    "checkpoint": {"every": 10},
    "evaluation": {"every": 0},
    "logging": {"every": 1},
}
FINGERPRINTS = {"python": "abc"}


def changed(key, value):
    config = copy.deepcopy(CONFIG)
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


def enter(path, config=CONFIG, fingerprints=FINGERPRINTS):
    """Opens and closes; the stored config.json."""
    with open_workdir(path, config, fingerprints) as workdir:
        return json.loads(workdir.config.read_text())


def test_begins_and_resumes(tmp_path):
    path = tmp_path / "new" / "run"
    stored = enter(path)
    assert stored["format_version"] == 1
    assert stored["config"] == json.loads(json.dumps(CONFIG)) and stored["fingerprints"] == FINGERPRINTS
    written = (path / "config.json").stat().st_ino
    assert enter(path) == stored
    assert (path / "config.json").stat().st_ino == written, "nothing changed, nothing is written"


@pytest.mark.parametrize(
    "key", ["train.steps", "checkpoint.every", "evaluation.every", "logging.every", "data.workers"]
)
def test_some_fields_may_change_on_resume(tmp_path, key):
    enter(tmp_path)
    config = changed(key, 7)
    stored = enter(tmp_path, config)
    assert stored["config"] == json.loads(json.dumps(config))
    assert stored["fingerprints"] == FINGERPRINTS and stored["format_version"] == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.family", "mamba", ["another model", "model.family", '"samba" there', '"mamba" here']),
        ("model.mixers.swa.window", 16, ["another model", "model.mixers.swa.window is 32 there and 16 here"]),
        ("model.mixers.swa.qk_norm", True, ["model.mixers.swa.qk_norm is absent there and true here"]),
        ("data.sources", [{"name": "python", "path": "/x"}], ["another run", 'data.sources[0].path is "stdlib" there']),
        ("train.seed", 1, ["another run", "train.seed is 0 there and 1 here"]),
        ("optimizer.betas", (0.9, 0.99), ["optimizer.betas[1] is 0.95 there and 0.99 here"]),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, key, value, said):
    before = enter(tmp_path)
    config = changed(key, value)
    config["train"]["steps"] = 5  # a change that is allowed does not slip in with one that is not
    with pytest.raises(UserError) as error:
        enter(tmp_path, config)
    assert all(words in str(error.value) for words in [*said, "--workdir", str(tmp_path)]), error.value
    assert json.loads((tmp_path / "config.json").read_text()) == before


def test_a_missing_key_is_a_difference(tmp_path):
    config = copy.deepcopy(CONFIG)
    del config["model"]["d_model"]
    enter(tmp_path)
    with pytest.raises(UserError, match="model.d_model is 64 there and absent here"):
        enter(tmp_path, config)


def test_a_field_newer_than_the_run_has_its_default(tmp_path):
    """A run of an older lcx goes on: what its config does not know yet means what it meant then."""
    enter(tmp_path)
    stored = enter(tmp_path, changed("data.start_token", None))
    assert stored["config"]["data"]["start_token"] is None
    with pytest.raises(UserError, match="train.z_loss is 0.0 there and 0.5 here"):
        enter(tmp_path, changed("train.z_loss", 0.5))


def test_other_data_are_refused(tmp_path):
    enter(tmp_path)
    with pytest.raises(UserError, match='other data: python is "abc" there and "def" here'):
        enter(tmp_path, fingerprints={"python": "def"})


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "certificate.json").write_text("{}")
    assert enter(tmp_path)["config"]


@pytest.mark.parametrize("remains", ["metrics.jsonl", "checkpoints"])
def test_a_run_without_its_config_is_refused(tmp_path, remains):
    (tmp_path / remains).mkdir()
    with pytest.raises(UserError, match=f"{remains} of a run but no config.json"):
        enter(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 2}', "\xff", '{"format_version": 1}', "[" * 100_000]
)
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        enter(tmp_path)


def test_an_unwritable_path_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/lcx-workdir"):
        with pytest.raises(UserError, match="cannot be written"):
            enter(path)
    with pytest.raises(UserError, match="gs://bucket/run cannot be reached: Please install gcsfs"):
        enter("gs://bucket/run")
    with pytest.raises(UserError, match="of no storage that is known"):
        enter("ftp://bucket/run")


def test_errors_of_the_run_pass(tmp_path):
    with pytest.raises(OSError, match="the run's own"), open_workdir(tmp_path, CONFIG, FINGERPRINTS):
        raise OSError("the run's own")
    enter(tmp_path)


HOLD = """
import sys, time
from lcx.training.workdir import open_workdir
with open_workdir(sys.argv[1], {}, {}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    for _ in range(2):  # a refused run does not free the lock
        with pytest.raises(UserError, match=f"in use by process {first.pid} on "):
            enter(tmp_path, {}, {})
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    enter(tmp_path, {}, {})


def test_the_same_process_cannot_open_it_twice(tmp_path):
    with open_workdir(tmp_path, CONFIG, FINGERPRINTS):
        with pytest.raises(UserError, match=f"this process \\({os.getpid()}\\)"):
            enter(tmp_path / ".." / tmp_path.name)
        held = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert "in use by process" in held.stderr, "the refusal must not free the lock"
    enter(tmp_path)
