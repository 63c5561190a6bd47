"""Every family's tiny size trains a step through the command line, whatever its schedule says."""

import json

import pytest

from lcx.cli.main import main


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "transformer.py:",
        "mamba.py:",
        "mamba2.py:",
        "samba.py:",
        "quickstart.py:",
        "infini.py:",
        "infini.py:update=segment_delta,",
        "sink.py:form=logit,",
        "sink.py:form=token,window=16,",
    ],
)
def test_one_step(config, tmp_path):
    arguments = [f"--config=configs/{config}sequence_length=32", "--config.train.steps=1"]
    assert main(["train", *arguments, "--config.evaluation.max_rows=8", f"--workdir={tmp_path}"]) == 0
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 4 < json.loads(line)["loss"] < 7
    assert (tmp_path / "checkpoints" / "1.manifest.json").exists()
