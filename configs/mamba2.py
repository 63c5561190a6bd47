"""Mamba-2: state-space duality alone (Dao and Gu 2024, arXiv 2405.21060).

    python scripts/train.py --config=configs/mamba2.py:size=tiny --workdir=runs/mamba2-tiny
    python scripts/train.py --config=configs/mamba2.py:size=370m --workdir=runs/mamba2-370m \
        --config.data.sources[0].path=pile/ --config.data.tokenizer=gpt-neox.json

Options: size (below; tiny if left out) and sequence_length. A published size keeps its tokens per step at any
sequence_length.
"""

import math

from ml_collections import ConfigDict

from lcx import recipes
from lcx.config import choose, default_config, parse_options

# 130m ... 2.7b: state-spaces/mamba, the checkpoints trained on 300e9 tokens of the Pile; the vocabulary of GPT-NeoX
# rounded up to 50,288. codestral-7b: mistralai/Mamba-Codestral-7B-v0.1, the defaults of transformers' Mamba2Config.
#
#   size             parameters (untied where said)
#   130m                128,989,632
#   370m                368,346,624
#   780m                780,161,280
#   1.3b              1,343,757,312
#   2.7b              2,702,599,680
#   codestral-7b      7,285,403,648 (untied)
SIZES = {
    "tiny": dict(layers=4, d_model=128, vocab_size=256, head_dim=16, state_size=16, groups=8, chunk_size=32),
    "130m": dict(layers=24, d_model=768, vocab_size=50_288),
    "370m": dict(layers=48, d_model=1024, vocab_size=50_288),
    "780m": dict(layers=48, d_model=1536, vocab_size=50_288),
    "1.3b": dict(layers=48, d_model=2048, vocab_size=50_288),
    "2.7b": dict(layers=64, d_model=2560, vocab_size=50_288),
    "codestral-7b": dict(layers=64, d_model=4096, vocab_size=32_768, groups=8, tied=False),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=370m,sequence_length=8192" or a part of it."""
    options = parse_options(arg, size="tiny", sequence_length=int)
    size = choose("size", options["size"], SIZES)

    config = default_config()
    model = config.model
    model.family = "mamba2"
    model.pattern = "mamba2"
    model.mixers = {
        "mamba2": {
            "type": "mamba2",
            "head_dim": size.get("head_dim", 64),
            "state_size": size.get("state_size", 128),
            "num_groups": size.get("groups", 1),
            "chunk_size": size.get("chunk_size", 256),
        }
    }
    model.periods = size["layers"]
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]
    model.tie_embeddings = size.get("tied", True)

    if options["size"] == "tiny":
        recipes.tiny(config, options["sequence_length"] or 512)
    elif options["size"] == "codestral-7b":
        codestral_training(config, options["sequence_length"] or 2048)
    else:
        recipes.pile(config, options["sequence_length"] or 2048)
    return config


def codestral_training(config: ConfigDict, sequence_length: int) -> None:
    """Nothing of its training is published. What stands in for it follows from the smaller sizes: 300e9 tokens, and
    of GPT-3 at 6.7B two million tokens a step and five times the learning rate."""
    recipes.gpt3_like(config, sequence_length, 2**21, math.ceil(300e9 / 2**21), learning_rate=6e-4)
