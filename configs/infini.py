"""Infini-Transformer: attention within segments and a compressive memory (Munkhdalai et al. 2024, arXiv 2404.07143).

    python scripts/train.py --config=configs/infini.py:size=tiny --workdir=runs/infini-tiny
    python scripts/train.py --config=configs/infini.py:size=paper,update=segment_delta --workdir=runs/infini \
        --config.data.sources[0].path=pg19/ --config.data.tokenizer=t5.json

Options: size (below; tiny if left out), update (linear or segment_delta) and sequence_length. A published size keeps
its tokens per step at any sequence_length.

The gates have a learning rate of their own, 0.01 at the peak, and no weight decay: with the model's learning rate they
hardly move from where they start. Watch them: `gate` and `memory_norm` are among the metrics, as histograms too.
"""

from ml_collections import ConfigDict

from lcx import recipes
from lcx.config import choose, default_config, parse_options

# paper: the language model of section 4.1: 12 layers, 8 heads of width 128, segments of 2048 tokens in rows of 32,768.
# The width of the stream is inferred from the heads; the vocabulary is not published: 32,000 stands in for it.
#
#   size    parameters (tied)
#   paper         234,120,288
SIZES = {
    "tiny": dict(periods=4, d_model=128, d_ff=384, heads=8, segment_length=128, vocab_size=256),
    "paper": dict(periods=12, d_model=1024, d_ff=4096, heads=8, segment_length=2048, vocab_size=32_000),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=paper,update=segment_delta" or a part of it."""
    options = parse_options(arg, size="tiny", update="linear", sequence_length=int)
    size = choose("size", options["size"], SIZES)

    config = default_config()
    model = config.model
    model.family = "infini"
    model.pattern = "infini mlp"
    model.mixers = {
        "infini": {
            "type": "infini",
            "num_heads": size["heads"],
            "segment_length": size["segment_length"],
            "update": options["update"],
        },
        "mlp": {"type": "mlp", "d_ff": size["d_ff"]},
    }
    model.periods = size["periods"]
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]

    if options["size"] == "tiny":
        recipes.tiny(config, options["sequence_length"] or 512)
    else:
        paper_training(config, options["sequence_length"] or 32_768)
    return config


def paper_training(config: ConfigDict, sequence_length: int) -> None:
    """64 rows of 32,768 tokens a step, a warm-up of 1000 steps, cosine (appendix A).

    The paper's optimizer is Adafactor with a peak of 0.01; here it is AdamW at 3e-4, the setting in which gates with a
    learning rate of their own were reported to spread out. Steps are not published: 30,000 stand in for them, the
    length of the paper's continued pre-training.
    """
    recipes.published(config, sequence_length, tokens_per_step=64 * 32_768, steps=30_000)
    config.optimizer.update(learning_rate=3e-4, warmup_steps=1000)
