"""`lcx plan` for devices that this machine can play: what it writes, and what it refuses."""

import json

import jax
import pytest

from lcx.cli.main import main
from lcx.cli.plan import bytes_needed

FAMILIES = ["transformer", "mamba", "mamba2", "samba", "infini", "sink"]
SMALL = ["train.sequence_length=64", "model.d_model=64", "model.periods=2", "train.batch_size=8"]
MESH = "--mesh=fsdp=2,seq=2,tensor=2"


def plan(folder, family, *words):
    config = [f"--config=configs/{family}.py:size=tiny", *(f"--config.{field}" for field in SMALL)]
    code = main(["plan", *config, f"--workdir={folder}", *words])
    return code, json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else None


def check(made):
    """What holds of every plan that fits."""
    parts = made["bytes_per_device"]
    assert made["format_version"] == 1 and made["fits"]
    assert parts["total"] == sum(parts[name] for name in parts if name != "total")
    assert min(parts.values()) > 0 and parts["total"] < made["hardware"]["bytes_per_device"]
    by_shapes, compiled = made["argument_bytes"]["by_shapes"], made["argument_bytes"]["compiled"]
    assert abs(by_shapes / compiled - 1) < 0.001
    flops = made["model_flops"]
    assert flops["per_step"] == sum(flops["by_layer"].values()) == flops["per_token"] * 8 * 64
    assert made["notes"] == []


@pytest.fixture(scope="module")
def samba(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    code, made = plan(folder, "samba", "--hardware=cpu:8", MESH)
    assert code == 0 and [path.name for path in folder.iterdir()] == ["plan.json"]
    return made


def test_a_plan_is_whole(samba):
    check(samba)
    assert samba["mesh"] == {"data": 1, "fsdp": 2, "seq": 2, "tensor": 2}
    assert samba["estimate"] is None  # nothing is published of this machine's speed


def test_what_is_sent_is_attributed(samba):
    """Halos of a window and of a convolution go over seq, weights are gathered over fsdp, sums go over tensor."""
    sent = {(entry["layer"], entry["collective"], *entry["axes"]): entry["bytes"] for entry in samba["wire"]}
    assert {axis for key in sent for axis in key[2:]} == {"fsdp", "seq", "tensor"}
    # Two periods; keys and values of four bytes, 32 tokens of the shard before, half of the rows and of the heads; and
    # their gradients on the way back.
    halo = 2 * 2 * (8 / 2) * 32 * (64 / 2) * 4
    assert halo <= sent["swa", "collective-permute", "seq"] <= 3 * halo
    # Two layers a period with three matrices of 64 x 384: gathered forward and backward.
    weights = 2 * 2 * 3 * 64 * 384 * 4 / 2 / 2
    assert weights <= sent["mlp", "all-gather", "fsdp"] <= 2 * weights
    assert sent["mlp", "all-reduce", "tensor"] > 0


def test_the_head_is_sent_once_however_many_chunks_the_loss_has(samba, tmp_path):
    """Its table to all who share it and its gradient to their sum: not once a chunk."""
    _, chunks = plan(tmp_path, "samba", "--hardware=cpu:8", MESH, "--config.train.loss_chunk_size=8")
    sent = [
        sum(entry["bytes"] for entry in made["wire"] if entry["layer"] == "head" and "fsdp" in entry["axes"])
        for made in (samba, chunks)
    ]
    assert 0 < sent[1] <= 1.01 * sent[0]


def test_the_largest_is_a_multiple_of_what_the_mesh_cuts(samba):
    largest = samba["largest"]
    assert largest["batch_size"] % 2 == 0 and largest["batch_size"] > 8
    assert largest["sequence_length"] % 2 == 0 and largest["sequence_length"] > 64
    assert "in proportion" in largest["method"]


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "samba"])
def test_arguments_of_every_family(tmp_path, family):
    code, made = plan(tmp_path, family, "--hardware=cpu:8", MESH)
    assert code == 0
    check(made)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--hardware=v5p:3x3x3"], "--hardware=v5p:3x3x3: a v5p slice is"),
        (["--hardware=v9:4"], '--hardware: unknown kind "v9"'),
        (["--hardware=cpu:8", "--mesh=fsdp=4"], "fsdp=4, seq=1, tensor=1 does not fill the 8"),
        (["--hardware=cpu:8", "--mesh=fsdp=3,seq=2"], "does not fill the 8"),
        (["--hardware=cpu:8", "--mesh=fsdp=2,seqs=4"], '--mesh: unknown axis "seqs": did you mean "seq"'),
        (["--hardware=cpu:8", "--mesh=seq=8", "--config.train.sequence_length=60"], "does not divide over mesh.seq=8"),
        (["--hardware=cpu:64"], "JAX has been started with 8 CPU devices"),
        ([], "lcx plan needs --hardware"),
    ],
)
def test_what_cannot_be_planned_is_said(tmp_path, capsys, words, sentence):
    code, made = plan(tmp_path, "transformer", *words)
    errors = capsys.readouterr().err
    assert code == 2 and made is None
    assert sentence in errors and errors.startswith("error: ") and len(errors.splitlines()) == 1


@pytest.mark.parametrize("hardware, package", [("v5p:2x2x1", "libtpu"), ("h100:8", "jax-cuda13-plugin")])
def test_a_compiler_that_is_not_installed(tmp_path, capsys, monkeypatch, hardware, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan(tmp_path, "transformer", f"--hardware={hardware}")[0] == 2
    assert f"its compiler is not installed: pip install {package}" in capsys.readouterr().err


def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["plan", "--config=configs/samba.py", "--hardware=cpu:8", f"--workdir={tmp_path / 'file' / 'w'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "refusal, expected",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
            20.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.90G) "
            "exceeds available HBM (15.75G).",
            16.9 * 2**30 + 1000,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.50M of 16.00M vmem.", None),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_what_a_compiler_says_of_a_program_that_does_not_fit(refusal, expected):
    assert bytes_needed(refusal, 1000) == (expected and int(expected))


def test_devices_are_left_as_they_are():
    assert jax.default_backend() == "cpu" and jax.device_count() == 8
