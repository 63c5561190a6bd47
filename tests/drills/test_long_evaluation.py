"""A million tokens in chunks: the same numbers as in one pass, and memory that does not grow."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import gc, json, resource, sys
import numpy as np
from flax import nnx
from lcx.cli.material import make_material
from lcx.config import Config, load_config
from lcx.evaluation.streaming import row_losses, stream
from lcx.models import LanguageModel
from lcx.params import create

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

length, chunk, compared = map(int, sys.argv[1:])
config = Config.from_dict(load_config("configs/samba.py:size=tiny"))
model = nnx.merge(*create(lambda: LanguageModel(config.model, nnx.Rngs(0))))
tokens = make_material(config).stretch("", length + 1)
whole = row_losses(model, tokens[None, : compared + 1], compared).astype(np.float64).mean() if compared else None
chunks, start, most, total, early = 0, None, 0, 0.0, None
for piece in stream(model, tokens[None], chunk):
    total += float(piece.losses.astype(np.float64).sum())
    read = piece.start + piece.losses.shape[1]
    if read == compared:
        early = total / read
    if start is None and read >= 32768:
        gc.collect()
        start = resident()
    elif start is not None:
        most = max(most, resident() - start)
print(json.dumps({"growth": most, "whole": whole, "in_chunks": early, "mean": total / length, "read": read}))
"""


def measure(length: int, chunk: int, compared: int) -> dict:
    """Growth of the resident memory after the first 32,768 tokens, and mean losses, of a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(length), str(chunk), str(compared)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """As users have it: one device, optimised code."""

    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


@pytest.mark.slow
@pytest.mark.long
def test_a_million_tokens_take_no_more_memory_than_the_first(record_property):
    found = measure(1_000_000, 2048, 32_768)
    record_property("found", found)
    print(found)
    assert found["read"] == 1_000_000
    assert found["growth"] < 50 * 2**20
    assert found["in_chunks"] == pytest.approx(found["whole"], abs=1e-5)
