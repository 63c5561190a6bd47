"""Models as small as can be, of every format, with random values in every parameter."""

from functools import lru_cache

import jax
import numpy as np

from lcx.config import ModelConfig
from lcx.interop.architecture import Architecture, architecture
from lcx.interop.card import Facts
from lcx.interop.export import Source
from lcx.params import path_name

HEADS = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
MLP = {"type": "mlp", "d_ff": 48}
MAMBA = {"type": "mamba", "state_size": 4}
MAMBA2 = {"type": "mamba2", "head_dim": 16, "state_size": 4, "num_groups": 2}
INFINI = {"type": "infini", "num_heads": 4, "num_kv_heads": 2, "segment_length": 8}

# name: (its format, pattern, mixers)
MODELS = {
    "llama": ("llama", "attention mlp", {"attention": HEADS, "mlp": MLP}),
    "mistral": ("mistral", "swa mlp", {"swa": HEADS | {"window": 8}, "mlp": MLP}),
    "qwen3": ("qwen3", "attention mlp", {"attention": HEADS | {"qk_norm": True}, "mlp": MLP}),
    "mamba": ("mamba", "mamba", {"mamba": MAMBA}),
    "mamba2": ("mamba2", "mamba2", {"mamba2": MAMBA2}),
    "samba": ("lcx", "mamba mlp swa mlp", {"mamba": MAMBA, "mlp": MLP, "swa": HEADS | {"window": 8}}),
    "infini": ("lcx", "infini mlp", {"infini": INFINI, "mlp": MLP}),
    "delta": ("lcx", "infini mlp", {"infini": INFINI | {"update": "segment_delta"}, "mlp": MLP}),
    "logit": ("lcx", "attention mlp", {"attention": HEADS | {"sink": "logit"}, "mlp": MLP}),
    "zero": ("lcx", "attention mlp", {"attention": HEADS | {"sink": "zero", "qk_norm": True}, "mlp": MLP}),
    "token": ("lcx", "swa mlp", {"swa": HEADS | {"window": 6, "sink_tokens": 2, "sink": "logit"}, "mlp": MLP}),
    "nope": ("lcx", "attention mlp", {"attention": HEADS | {"rope_base": None}, "mlp": MLP}),
    "parallel": (
        "lcx",
        "parallel(mamba, attention) mlp mamba2",
        {"mamba": MAMBA | {"dt_B_C_norm": True}, "attention": HEADS, "mlp": MLP, "mamba2": MAMBA2},
    ),
}


def config(name: str, **fields) -> ModelConfig:
    """The config of one of MODELS."""
    _, pattern, mixers = MODELS[name]
    sizes = dict(periods=2, d_model=32, vocab_size=264, compute_dtype="float32")
    return ModelConfig.from_dict(sizes | dict(pattern=pattern, mixers=mixers) | fields)


def draw(model: Architecture, seed: int = 0) -> dict:
    """Parameters of which none is without effect: matrices of variance 1 / d_model, norms near 1."""
    random = np.random.default_rng(seed)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = random.standard_normal(leaf.shape, np.float32)
        name = path_name(path)
        if name.endswith(("scale", "/D")):
            return 1 + 0.1 * noise
        if name.endswith("A_log"):
            return np.log(np.arange(1, leaf.shape[-1] + 1, dtype=np.float32)) + 0.1 * noise
        if name.endswith(("dt_bias", "gate", "bias", "sink_logit")) or noise.ndim == 2 and "stack" in name:
            return noise - 2 * name.endswith("dt_bias")
        return noise / np.float32(np.sqrt(model.config.d_model))

    return jax.tree_util.tree_map_with_path(value, model.shapes)


@lru_cache
def model(name: str, **fields) -> tuple[Architecture, dict]:
    """One of MODELS and its parameters; not to be changed."""
    made = architecture(config(name, **fields))
    return made, draw(made)


def source(made: Architecture, params: dict, **fields) -> Source:
    """What is exported, in place of a checkpoint."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    read = lambda path, period: leaves[path] if period is None else leaves[path][period]  # noqa: E731
    facts = Facts(
        name="small",
        family="small",
        step=3,
        tokens=300,
        sequence_length=32,
        data=("words",),
        tokenizer="bytes",
        optimizer="adamw",
        learning_rate=1e-3,
    )
    given = dict(vocab_size=made.config.vocab_size, tokenizer="bytes", start_token=None, end_token=255, facts=facts)
    return Source(config=made.config, read=read, **given | fields)
