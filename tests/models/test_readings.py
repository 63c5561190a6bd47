"""Whole models against readings of the papers: NumPy in float64, token by token (tests/readings)."""

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.config import Config, load_config
from lcx.laws.measure import deviation
from lcx.laws.subject import spread
from lcx.models import LanguageModel
from lcx.params import create
from tests.readings import of_lcx
from tests.readings.infini import infini_lm_logits
from tests.readings.mamba2 import mamba2_logits
from tests.readings.samba import samba_logits

ROWS = ((7, 1, 10), (18,))  # the documents of two rows
HEADS, KV_HEADS, WINDOW, SEGMENT = 4, 2, 5, 4
SMALL = {
    "attention": {"num_heads": HEADS, "num_kv_heads": KV_HEADS},
    "infini": {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "segment_length": SEGMENT},
    "mlp": {"d_ff": 20},
    "mamba": {"state_size": 3, "chunk_size": 4},
    "mamba2": {"state_size": 3, "chunk_size": 4, "head_dim": 8, "num_groups": 1},
}
CASES = [
    "mamba2",
    "samba",
    "samba:pattern=mamba-swa-mlp",
    "samba:pattern=mamba-mlp",
    "samba:pattern=swa-mlp",
    "samba:pattern=nope",
    "samba:full_attention=1",
    "infini",
    "infini:update=segment_delta",
]


def small(case: str, **mamba):
    file, _, options = case.partition(":")
    config = load_config(f"configs/{file}.py:{options}")
    dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "residual_dtype"), "float64")
    config.model.update(d_model=16, vocab_size=23, **dtypes)
    with config.unlocked():
        for record in config.model.mixers.values():
            record.update(SMALL[record["type"]])
            record.update(mamba if record["type"] == "mamba" else {})
            if record.get("window"):
                record["window"] = WINDOW
    return Config.from_dict(config).model


def read(config, weights: dict, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The reading's logits of one row; layers are named after their mixer, all else is in the config."""
    heads = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, positions=positions)
    if config.family == "mamba2":
        return mamba2_logits(tokens, weights, num_groups=1, positions=positions)
    if config.family == "infini":
        record = config.mixers["infini"]
        options = dict(segment_length=SEGMENT, update=record["update"], rope_base=10_000.0)
        return infini_lm_logits(tokens, weights, **heads, **options)
    record = config.mixers.get("swa", {})
    pattern = tuple({"swa": "attention"}.get(name, name) for name in config.pattern.split())
    window = None if "attention" in config.mixers else WINDOW
    rope_base = record.get("rope_base", 10_000.0)
    return samba_logits(tokens, weights, **heads, window=window, rope_base=rope_base, pattern=pattern)


@pytest.mark.parametrize("case", [*CASES, "normed mamba"])
def test_logits(case):
    with jax.enable_x64(True):
        config = small("samba", dt_B_C_norm=True) if case == "normed mamba" else small(case)
        graphdef, params = create(lambda: LanguageModel(config, nnx.Rngs(0)))
        params = spread(params)
        positions = np.stack([np.concatenate([np.arange(size) for size in sizes]) for sizes in ROWS]).astype(np.int32)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, positions.shape, np.int32)
        run = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, positions=positions)[0])
        found = np.asarray(run(params))
    weights = of_lcx.model(config, params)
    expected = np.stack([read(config, weights, *row) for row in zip(tokens, positions, strict=True)])
    distance = deviation({"logits": found}, {"logits": expected})
    assert distance.value < 1e-9, distance
