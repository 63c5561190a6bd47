"""The table of `lcx train --dry_run`."""

import jax
import pytest

from lcx.cli.main import main

CONFIG = "--config=configs/samba.py:size=421m"


def test_a_mesh_that_is_not_here(tmp_path, capsys):
    workdir = tmp_path / "w"
    words = ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", f"--workdir={workdir}"]
    assert main(["train", CONFIG, "--dry_run", *words]) == 0
    assert not workdir.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "parameter" and lines[0].endswith("bytes per device")
    rows = {line.split()[0]: line for line in lines[1:26]}
    weight = rows["stack/layers/0_mamba/mixers/mamba/in_proj/weight"]
    # [6, 1536, 2, 3072] in float32, over four devices and over two.
    assert "(6, 1536, 2, 3072)  float32  (-, fsdp, -, tensor)" in weight and weight.endswith(f"{6 * 1536 * 3072:,}" * 1)
    assert lines[27] == f"mesh data=2 x fsdp=4 x seq=1 x tensor=2: 16 devices; {jax.device_count()} visible here"
    parameters = sum(int(row.split()[-1].replace(",", "")) for row in rows.values())
    assert lines[28] == f"parameters: {parameters:,} bytes per device"
    assert lines[29] == f"optimizer: {2 * parameters + 8:,} bytes per device"  # two moments, two counters


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("--config.mesh.tensor=7", "embedding/table has vocab=32000, which does not divide over the 7 devices"),
        (
            "--config.mesh.fsdp=1024",
            "train.batch_size=512 does not divide over 1024 devices (mesh.data times mesh.fsdp)",
        ),
        ("--config.mesh.seq=3", "train.sequence_length=4096 does not divide over mesh.seq=3"),
    ],
)
def test_what_does_not_divide_is_named(tmp_path, capsys, word, sentence):
    assert main(["train", CONFIG, "--dry_run", f"--workdir={tmp_path}", word, "--config.mesh.data=1"]) == 2
    assert sentence in capsys.readouterr().err
