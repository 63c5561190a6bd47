"""Certificates: what is written, printed and refused, and mixers that break a law, declared or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lcx.cli.main import main
from lcx.cli.verify import parse_mesh
from lcx.config import MeshConfig

ROOT = Path(__file__).parents[2]
MIXERS = """
import jax
from examples.moving_average import MovingAverage
from lcx.parallel.sharding import ambient_mesh


class Truncated(MovingAverage):
    def __call__(self, x, state, context):
        if ambient_mesh() is not None:
            state = jax.lax.stop_gradient(state)
        return super().__call__(x, state, context)


class Forgetful(MovingAverage):
    lawful_except = ("continuation",)

    def __call__(self, x, state, context):
        return super().__call__(x, None, context)


class Modest(MovingAverage):
    lawful_except = ("causality",)


class Misspelt(MovingAverage):
    lawful_except = ("causalty",)


class Broken(MovingAverage):
    def __call__(self, x, state, context):
        if ambient_mesh() is not None:
            raise RuntimeError("not on a mesh")
        return super().__call__(x, state, context)
"""


@pytest.fixture(autouse=True, scope="module")
def started():
    """JAX has its eight devices, of which verify takes the first."""
    assert len(jax.devices()) == 8


def words(workdir: Path, mixer: str, mesh: str, *more: str) -> list[str]:
    """A command line that tries a mixer on a mesh."""
    return [
        "verify",
        f"--config={ROOT}/configs/samba.py:size=421m,sequence_length=64",
        "--config.model.pattern=average mlp",
        f"--config.model.mixers.average.type={mixer}",
        f"--mesh={mesh}",
        f"--workdir={workdir}",
        *more,
    ]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with mixers of a user's, in which the user stands."""
    (tmp_path / "mine.py").write_text(MIXERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    yield
    sys.modules.pop("mine", None)


def certificate(workdir: Path) -> dict:
    return json.loads((workdir / "certificate.json").read_text())


def broken(workdir: Path) -> set[str]:
    return {finding["law"] for finding in certificate(workdir)["laws"] if not finding["holds"]}


def test_a_lawful_config_is_certified(tmp_path, capsys):
    (tmp_path / "config.json").write_text("of a run")
    assert main(words(tmp_path, "examples.moving_average:MovingAverage", "data=2,seq=2")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "certificate.json"}
    assert (tmp_path / "config.json").read_text() == "of a run"
    found = certificate(tmp_path)
    assert found["format_version"] == 1 and found["passed"] is True and len(found["config_hash"]) == 64
    assert found["mesh"] == {"data": 2, "fsdp": 1, "seq": 2, "tensor": 1} and found["jax_version"] == jax.__version__
    assert {finding["law"] for finding in found["laws"]} == {
        "causality",
        "continuation",
        "isolation",
        "sharding",
        "backend",
    }
    for finding in found["laws"]:
        assert finding["passed"] and finding["deviation"] <= finding["allowed"] and finding["first"] is None, finding
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["law", "what", "is", "compared", "allowed", "found", "where"]
    assert len(printed) == len(found["laws"]) + 3 and printed[-2] == "certified on data=2,seq=2: all laws hold."


def test_the_first_array_that_differs_is_named(mine, tmp_path, capsys):
    workdir = tmp_path / "new" / "folder"
    assert main(words(workdir, "mine:Truncated", "seq=2")) == 1
    found = certificate(workdir)
    first = {finding["first"] for finding in found["laws"] if not finding["passed"]}
    assert found["passed"] is False and broken(workdir) == {"sharding"}
    assert first == {"state_gradient/0_average/average/average"}
    assert "FAILED on seq=2: sharding: state_gradient/0_average/average/average is the first" in capsys.readouterr().out


@pytest.mark.slow
def test_a_law_that_a_mixer_declares_to_break_may_break(mine, tmp_path, capsys):
    assert main(words(tmp_path / "w", "mine:Forgetful", "data=2")) == 0
    assert broken(tmp_path / "w") == {"continuation"}
    assert "  declared  " in capsys.readouterr().out


@pytest.mark.slow
def test_a_law_that_is_declared_to_break_and_holds_is_told(mine, tmp_path, capsys):
    assert main(words(tmp_path / "w", "mine:Modest", "data=2")) == 0
    assert "holds, though Modest declares that it breaks this law" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mixer_that_raises_breaks_the_law(mine, tmp_path, capsys):
    assert main(words(tmp_path / "w", "mine:Broken", "data=2")) == 1
    assert "FAILED on data=2: sharding: RuntimeError: not on a mesh" in capsys.readouterr().out
    assert broken(tmp_path / "w") == {"sharding", "causality", "isolation"}


@pytest.mark.parametrize(
    "mesh, more, sentence",
    [
        ("data=2,seq", [], '--mesh: cannot read "seq" in "data=2,seq": write axes and sizes, like data=2,seq=4.'),
        ("data=-1", [], '--mesh: cannot read "data=-1" in "data=-1": write axes'),
        ("seq=0", [], '--mesh: cannot read "seq=0"'),
        ("sequence=2", [], '--mesh: unknown axis "sequence": did you mean "seq"? Allowed: data, fsdp, seq, tensor.'),
        ("data=2,data=4", [], "--mesh: data is given twice."),
        ("data=32,seq=32", [], "--mesh: 1024 devices are more than the 64"),
        ("data=16", [], "run `lcx verify` as a process of its own."),
        ("seq=2", ["--config.model.mixers.average.spred=2"], 'unknown key "model.mixers.average.spred": did you mean'),
        ("seq=2", ["--config.modle.periods=2"], 'unknown key "modle": did you mean "model"?'),
        (
            "tensor=8",
            ["--config.model.pattern=swa"],
            "has kv_heads=12, which does not divide over the 8",
        ),
        ("seq=8", ["--config.train.sequence_length=60"], "train.sequence_length=60 does not divide over mesh.seq=8"),
        ("data=8", ["--config.train.batch_size=12"], "train.batch_size=12 does not divide over 8 devices"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(tmp_path, capsys, mesh, more, sentence):
    assert main(words(tmp_path, "examples.moving_average:MovingAverage", mesh, *more)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "certificate.json").exists()


def test_exceptions_are_laws(mine, tmp_path, capsys):
    assert main(words(tmp_path, "mine:Misspelt", "data=2")) == 2
    assert 'Misspelt.lawful_except: unknown law "causalty": did you mean "causality"?' in capsys.readouterr().err


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(words(tmp_path / "file", "examples.moving_average:MovingAverage", "data=2")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_meshes_are_read():
    assert parse_mesh(" data=2 , tensor=04") == MeshConfig(data=2, tensor=4)


@pytest.mark.parametrize(
    "environment", [{}, {"JAX_PLATFORMS": "cuda"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}]
)
def test_devices_are_made_whatever_the_machine_has(environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    code = "from lcx.cli.verify import cpu_devices; made = cpu_devices(6); import jax; print(jax.devices() == made)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", ["samba.py:size=421m", "infini.py:size=paper,update=segment_delta", "sink.py"])
def test_the_script_certifies_published_configs(config, tmp_path):
    command = ["scripts/verify.py", f"--config=configs/{config}", "--mesh=data=2,seq=4", f"--workdir={tmp_path}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert certificate(tmp_path)["passed"]
