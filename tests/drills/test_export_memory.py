"""Exporting takes the memory of a few tensors, not of the model."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lcx.config import Config, default_config
from lcx.files import write_json
from lcx.interop.architecture import architecture
from lcx.params import count_parameters
from lcx.training.checkpointing import Checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc"),
]

# The high-water mark of this program alone: ru_maxrss begins with that of the process which started it.
MEASURE = """
import re, sys
import jax, lcx.cli.load, lcx.interop.export
from lcx.cli.main import main
jax.devices()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
assert main(sys.argv[1:]) == 0
print("more", peak() - before)
"""


def test_memory(tmp_path):
    config = default_config()
    config.model.update(pattern="mlp", periods=40, d_model=512, vocab_size=256)
    config.model.mixers = {"mlp": {"type": "mlp", "d_ff": 2048}}
    model = architecture(Config.from_dict(config).model)
    random = np.random.default_rng(0)  # what is stored is compressed
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), model.shapes)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.save(7, {"params": params})
    checkpoints.close()
    write_json(tmp_path / "run" / "config.json", {"config": config.to_dict(), "fingerprints": {}})
    flags = ["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--noverify"]
    command = [sys.executable, "-c", MEASURE, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    more, whole = int(done.stdout.split("more ")[1]), 4 * count_parameters(params)
    assert whole > 5e8 and more < whole / 4, f"{more / 1e6:.0f} MB more for a model of {whole / 1e6:.0f} MB"
