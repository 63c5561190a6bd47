"""Small runs of every family, and their exports: made once for all tests that look at them."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import torch

from lcx.cli.main import main
from lcx.config import Config, load_config, override
from lcx.data import batch as read_batch
from lcx.files import write_json
from lcx.parallel.mesh import make_mesh
from lcx.training.checkpointing import Checkpoints
from lcx.training.trainer import lower_step, make_program

torch.set_num_threads(1)  # for matrices as small as these, threads only wait for each other

STEPS, ROWS, TIME = 200, 2, 48
FAMILIES = {
    "transformer": "configs/transformer.py:size=tiny",
    "mamba": "configs/mamba.py:size=tiny",
    "mamba2": "configs/mamba2.py:size=tiny",
    "samba": "configs/samba.py:size=tiny",
    "infini": "configs/infini.py:size=tiny",
    "sink": "configs/sink.py:size=tiny,form=token,window=12",
}
# Windows and segments are passed several times in a row.
SHORT = {"samba": ["model.mixers.swa.window=12"], "infini": ["model.mixers.infini.segment_length=12"]}
FASTER = {"xla_backend_optimization_level": 1}  # than what the tests compile with, over so many steps
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """A trained run and what was exported of it."""

    workdir: Path
    export: Path


def text(length: int, seed: int) -> bytes:
    """Words of a small vocabulary."""
    random = np.random.default_rng(seed)
    words = [bytes(random.integers(97, 123, size, np.uint8)) for size in random.integers(2, 8, 40)]
    return b" ".join(words[word] for word in random.zipf(1.3, length) % 40)[:length]


def make_run(family: str, folder: Path) -> Path:
    """The workdir of a tiny model after some steps of lcx's own train step, on one device."""
    corpus, workdir = folder / "words", folder / family
    corpus.mkdir(exist_ok=True)
    for number in range(60):
        (corpus / f"{number:03}.txt").write_bytes(text(1000, seed=number % 7))
    config = load_config(f"{ROOT}/{FAMILIES[family]},sequence_length={TIME}")
    settings = [f"data.sources[0].path={corpus}", "data.workers=0", f"train.batch_size={ROWS}", f"train.steps={STEPS}"]
    for setting in [*settings, "mesh.data=1", *SHORT.get(family, [])]:
        override(config, *setting.split("=", 1))
    config = Config.from_dict(config)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    state, step = program.create(), lower_step(program).compile(compiler_options=FASTER)
    for index in range(STEPS):
        state, metrics = step(state, program.put(read_batch(config, index)))
    assert float(metrics["loss"]) < 4, "it has not learned anything"
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(STEPS, state)
    checkpoints.close()
    write_json(workdir / "config.json", {"config": config.to_dict(), "fingerprints": {}})
    return workdir


def make_export(workdir: Path, *flags: str, name: str = "export") -> Path:
    """The folder that `lcx export` writes of a workdir, which must succeed."""
    out = workdir.parent / f"{workdir.name}-{name}"
    assert main(["export", f"--workdir={workdir}", f"--out={out}", *flags]) == 0
    return out
