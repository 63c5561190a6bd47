"""Learnable-sink Transformer: Transformer++ whose softmax need not spend its weight on tokens.

    python scripts/train.py --config=configs/sink.py:size=tiny --workdir=runs/sink-tiny
    python scripts/train.py --config=configs/sink.py:size=160m,form=token,window=1023 --workdir=runs/sink-160m \
        --config.data.sources[0].path=pile/ --config.data.tokenizer=gpt-neox.json

Options: size (below; tiny if left out), sequence_length, window (none if left out), and form:

    form=logit     a trained logit a head in the softmax's denominator (gpt-oss); the default
    form=zero      the same, fixed to 0: softmax-off-by-one
    form=token     a trained token that the data puts before every document, never hidden by a window (Xiao et al.
                   2023, arXiv 2309.17453)

A published size keeps its tokens per step at any sequence_length.
"""

from ml_collections import ConfigDict

from lcx import recipes
from lcx.config import choose, default_config, parse_options

# 160m: in the place of Pythia-160M, which the paper trains three times (section 4.2) and which has LayerNorm, GELU and
# parallel layers: as many layers, heads and parameters of Transformer++. The learning rate is Pythia's, as its own
# paper gives it.
#
#   size    parameters (untied; form=logit)
#   160m             162,220,944
SIZES = {
    "tiny": dict(periods=4, d_model=128, d_ff=384, heads=8, vocab_size=256, start_token=256, tied=True),
    "160m": dict(periods=12, d_model=768, d_ff=2048, heads=12, vocab_size=50_304, start_token=50_303, tied=False),
}
FORMS = {"logit": {"sink": "logit"}, "zero": {"sink": "zero"}, "token": {"sink_tokens": 1}}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=160m,form=token,window=1023" or a part of it."""
    options = parse_options(arg, size="tiny", form="logit", sequence_length=int, window=int)
    size = choose("size", options["size"], SIZES)
    form = choose("form", options["form"], FORMS)

    config = default_config()
    model = config.model
    model.family = "sink"
    model.pattern = "attention mlp"
    heads = {"type": "attention", "num_heads": size["heads"], "window": options["window"]}
    model.mixers = {"attention": heads | form, "mlp": {"type": "mlp", "d_ff": size["d_ff"]}}
    model.periods = size["periods"]
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]
    model.tie_embeddings = size["tied"]
    if options["form"] == "token":
        config.data.start_token = size["start_token"]
        if size["start_token"] >= model.vocab_size:
            model.vocab_size += 8  # eight, so that it divides over devices as before

    if options["size"] == "tiny":
        recipes.tiny(config, options["sequence_length"] or 512)
    else:
        pythia_training(config, options["sequence_length"] or 2048)
    return config


def pythia_training(config: ConfigDict, sequence_length: int) -> None:
    """143,000 steps of 256 rows of 2048 tokens, cosine to a tenth, a warm-up of 1% of the steps."""
    recipes.published(config, sequence_length, tokens_per_step=256 * 2048, steps=143_000)
    config.optimizer.update(learning_rate=6e-4, warmup_steps=1430, final_ratio=0.1)
