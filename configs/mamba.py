"""Mamba: selective state spaces alone (Gu and Dao 2023, arXiv 2312.00752).

    python scripts/train.py --config=configs/mamba.py:size=tiny --workdir=runs/mamba-tiny
    python scripts/train.py --config=configs/mamba.py:size=370m --workdir=runs/mamba-370m \
        --config.data.sources[0].path=pile/ --config.data.tokenizer=gpt-neox.json

Options: size (below; tiny if left out) and sequence_length. A published size keeps its tokens per step at any
sequence_length.
"""

from ml_collections import ConfigDict

from lcx import recipes
from lcx.config import choose, default_config, parse_options

# 130m ... 2.8b: state-spaces/mamba, the checkpoints trained on 300e9 tokens of the Pile; the vocabulary of GPT-NeoX
# rounded up to 50,280. 432m, samba-1.3b, 1.8b: the Mamba baselines of the SAMBA paper (arXiv 2406.07522, table 11;
# microsoft/Samba, lit_gpt/config.py), on SlimPajama and the Phi-2 data.
#
#   size          parameters (tied)
#   130m          129,135,360
#   370m          371,516,416
#   790m          793,204,224
#   1.4b          1,372,178,432
#   2.8b          2,768,345,600
#   432m          432,804,864
#   samba-1.3b    1,334,740,992
#   1.8b          1,795,295,232
SIZES = {
    "tiny": dict(layers=4, d_model=128, vocab_size=256),
    "130m": dict(layers=24, d_model=768, vocab_size=50_280),
    "370m": dict(layers=48, d_model=1024, vocab_size=50_280),
    "790m": dict(layers=48, d_model=1536, vocab_size=50_280),
    "1.4b": dict(layers=48, d_model=2048, vocab_size=50_280),
    "2.8b": dict(layers=64, d_model=2560, vocab_size=50_280),
    "432m": dict(layers=60, d_model=1024, vocab_size=32_000),
    "samba-1.3b": dict(layers=48, d_model=2048, vocab_size=32_000),
    "1.8b": dict(layers=64, d_model=2048, vocab_size=50_304),
}

# Rows of 4096 tokens. The schedule of the Phi-2 run is not published; SlimPajama's stands in for it.
SAMBA_RECIPES = {
    "432m": dict(tokens=20e9, batch_size=512, learning_rate=4e-4),
    "samba-1.3b": dict(tokens=100e9, batch_size=512, learning_rate=4e-4),
    "1.8b": dict(tokens=230e9, batch_size=2048, learning_rate=6e-4),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=370m,sequence_length=8192" or a part of it."""
    options = parse_options(arg, size="tiny", sequence_length=int)
    size = choose("size", options["size"], SIZES)

    config = default_config()
    model = config.model
    model.family = "mamba"
    model.pattern = "mamba"
    model.mixers = {"mamba": {"type": "mamba"}}
    model.periods = size["layers"]
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]

    if options["size"] == "tiny":
        recipes.tiny(config, options["sequence_length"] or 512)
    elif options["size"] in SAMBA_RECIPES:
        recipes.slimpajama(config, options["sequence_length"] or 4096, **SAMBA_RECIPES[options["size"]])
    else:
        recipes.pile(config, options["sequence_length"] or 2048)
    return config
