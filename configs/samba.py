"""SAMBA: Mamba, sliding-window attention and MLPs in turn (Ren et al. 2024, arXiv 2406.07522).

    python scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/samba-tiny
    python scripts/train.py --config=configs/samba.py:size=421m --workdir=runs/samba-421m \
        --config.data.sources[0].path=slimpajama/ --config.data.tokenizer=llama-2.json

Options: size (below; tiny if left out) and sequence_length. A published size keeps its tokens per step at any
sequence_length, so that its learning rate and steps stay what they are.
"""

import math

from ml_collections import ConfigDict

from lcx.config import choose, default_config, parse_options

# Table 12 of the paper and microsoft/Samba, lit_gpt/config.py. Layers there are residual sublayers, four a period.
# Trained on SlimPajama (421m, 1.3b), the Phi-2 data (1.7b), the first phase of the Phi-3 data (3.8b). The schedule of
# the Phi runs is not published; SlimPajama's stands in for it.
#
#   size   parameters (tied)   tokens
#   421m         421,793,280   20e9
#   1.3b       1,330,207,488   100e9
#   1.7b       1,742,194,688   230e9
#   3.8b       3,864,275,712   3.2e12
SIZES = {
    "tiny": dict(periods=2, d_model=128, d_ff=384, heads=8, kv_heads=8, window=128, vocab_size=256),
    "421m": dict(periods=6, d_model=1536, d_ff=4096, heads=12, kv_heads=12, window=2048, vocab_size=32_000),
    "1.3b": dict(periods=9, d_model=2304, d_ff=6144, heads=18, kv_heads=18, window=2048, vocab_size=32_000),
    "1.7b": dict(periods=12, d_model=2048, d_ff=8196, heads=32, kv_heads=4, window=2048, vocab_size=50_304),
    "3.8b": dict(periods=16, d_model=2816, d_ff=9984, heads=11, kv_heads=1, window=2048, vocab_size=32_064),
}

# Of rows of 4096 tokens (section 4 and table 12 of the paper).
RECIPES = {
    "421m": dict(tokens=20e9, batch_size=512, learning_rate=4e-4),
    "1.3b": dict(tokens=100e9, batch_size=512, learning_rate=4e-4),
    "1.7b": dict(tokens=230e9, batch_size=2048, learning_rate=6e-4),
    "3.8b": dict(tokens=3.2e12, batch_size=2048, learning_rate=6e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=421m,sequence_length=32768" or a part of it."""
    options = parse_options(arg, size="tiny", sequence_length=int)
    size = choose("size", options["size"], SIZES)

    config = default_config()
    model = config.model
    model.family = "samba"
    model.pattern = "mamba mlp swa mlp"
    model.mixers = {
        "mamba": {"type": "mamba"},
        "mlp": {"type": "mlp", "d_ff": size["d_ff"]},
        "swa": {
            "type": "attention",
            "num_heads": size["heads"],
            "num_kv_heads": size["kv_heads"],
            "window": size["window"],
        },
    }
    model.periods = size["periods"]
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]

    if options["size"] == "tiny":
        tiny_training(config, options["sequence_length"] or 512)
    else:
        published_training(config, options["sequence_length"] or 4096, **RECIPES[options["size"]])
    return config


def tiny_training(config: ConfigDict, sequence_length: int) -> None:
    """A minute on two CPU cores."""
    config.train.update(steps=200, batch_size=8, sequence_length=sequence_length)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=20)
    config.checkpoint.every = 50


def published_training(
    config: ConfigDict, sequence_length: int, tokens: float, batch_size: int, learning_rate: float
) -> None:
    """The paper's run: AdamW that decays every parameter, cosine to a tenth, a warm-up of 1% of the tokens."""
    tokens_per_step = batch_size * 4096
    steps = math.ceil(tokens / tokens_per_step)
    config.train.update(
        steps=steps, batch_size=max(1, tokens_per_step // sequence_length), sequence_length=sequence_length
    )
    config.optimizer.update(
        learning_rate=learning_rate, warmup_steps=steps // 100, final_ratio=0.1, weight_decay=0.1, decay_all=True
    )
    config.model.remat = {name: "full" for name in config.model.mixers}
