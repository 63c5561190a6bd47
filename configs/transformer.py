"""Transformer++: rotary attention and SwiGLU MLPs in turn, as in Llama.

    python scripts/train.py --config=configs/transformer.py:size=tiny --workdir=runs/transformer-tiny
    python scripts/train.py --config=configs/transformer.py:size=1.3b --workdir=runs/transformer-1.3b \
        --config.data.sources[0].path=slimpajama/ --config.data.tokenizer=llama-2.json

Options: size (below; tiny if left out), sequence_length and window (size=438m,window=2048 and size=1.3b,window=2048 are
Llama-2-SWA of the SAMBA paper). A published size keeps its tokens per step at any sequence_length.
"""

from ml_collections import ConfigDict

from lcx import recipes
from lcx.config import choose, default_config, parse_options

# 438m, 1.3b: LLaMA_438M and LLaMA_1.3B of microsoft/Samba, lit_gpt/config.py; the second has the tied embedding and
# the initialisation of Mamba. 1.6b, mistral-1.6b: Llama-3 and Mistral of the SAMBA paper (arXiv 2406.07522, table 11);
# untied is inferred from the name, the rotary base is not published. pp-*: Transformer++ of the Mamba papers' scaling
# laws (arXiv 2312.00752, table 12), vocabulary of GPT-NeoX rounded up to 50,280.
#
#   size            parameters             embedding
#   438m            438,081,024            untied
#   1.3b            1,347,842,304          tied
#   1.6b            1,641,187,328          untied
#   mistral-1.6b    1,641,187,328          untied, window of 2048
#   pp-125m         123,568,896            tied
#   pp-350m         359,818,240            tied
#   pp-760m         756,782,592            tied
#   pp-1.3b         1,317,324,800          tied
SIZES = {
    "tiny": dict(periods=4, d_model=128, d_ff=384, heads=8, vocab_size=256),
    "438m": dict(periods=12, d_model=1536, d_ff=4096, heads=12, vocab_size=32_000, tied=False, init="small"),
    "1.3b": dict(periods=20, d_model=2304, d_ff=6144, heads=18, vocab_size=32_000),
    "1.6b": dict(
        periods=24, d_model=2048, d_ff=8196, heads=32, kv_heads=4, vocab_size=50_304, tied=False, init="small"
    ),
    "pp-125m": dict(periods=12, d_model=768, d_ff=2048, heads=12, vocab_size=50_280),
    "pp-350m": dict(periods=24, d_model=1024, d_ff=2816, heads=16, vocab_size=50_280),
    "pp-760m": dict(periods=24, d_model=1536, d_ff=4096, heads=16, vocab_size=50_280),
    "pp-1.3b": dict(periods=24, d_model=2048, d_ff=5504, heads=32, vocab_size=50_280),
}
SIZES["mistral-1.6b"] = SIZES["1.6b"] | dict(window=2048)

# The SAMBA paper's runs: tokens, sequences of 4096 tokens a step, peak learning rate (the Phi runs' schedule is not
# published; SlimPajama's stands in for it).
SAMBA_RECIPES = {
    "438m": dict(tokens=20e9, batch_size=512, learning_rate=4e-4),
    "1.3b": dict(tokens=100e9, batch_size=512, learning_rate=4e-4),
    "1.6b": dict(tokens=230e9, batch_size=2048, learning_rate=6e-4),
    "mistral-1.6b": dict(tokens=230e9, batch_size=2048, learning_rate=6e-4),
}
# The Mamba paper's scaling laws: half a million tokens a step in rows of 2048, five times GPT-3's learning rate.
SCALING_LAW_RECIPES = {
    "pp-125m": dict(steps=4_800, learning_rate=3e-3),
    "pp-350m": dict(steps=13_500, learning_rate=1.5e-3),
    "pp-760m": dict(steps=29_000, learning_rate=1.25e-3),
    "pp-1.3b": dict(steps=50_000, learning_rate=1e-3),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=1.3b,sequence_length=8192" or a part of it."""
    options = parse_options(arg, size="tiny", sequence_length=int, window=int)
    size = choose("size", options["size"], SIZES)

    config = default_config()
    model = config.model
    model.family = "transformer"
    model.pattern = "attention mlp"
    model.mixers = {
        "attention": {
            "type": "attention",
            "num_heads": size["heads"],
            "num_kv_heads": size.get("kv_heads"),
            "window": options["window"] or size.get("window"),
        },
        "mlp": {"type": "mlp", "d_ff": size["d_ff"]},
    }
    model.periods = size["periods"]
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]
    model.tie_embeddings = size.get("tied", True)
    model.init = size.get("init", "fan_in")

    if options["size"] in SAMBA_RECIPES:
        recipes.slimpajama(config, options["sequence_length"] or 4096, **SAMBA_RECIPES[options["size"]])
    elif options["size"] in SCALING_LAW_RECIPES:
        recipe = SCALING_LAW_RECIPES[options["size"]]
        recipes.gpt3_like(config, options["sequence_length"] or 2048, tokens_per_step=2**19, **recipe)
    else:
        recipes.tiny(config, options["sequence_length"] or 512)
    return config
