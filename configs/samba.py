"""SAMBA: Mamba, sliding-window attention and MLPs in turn (Ren et al. 2024, arXiv 2406.07522).

    python scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/samba-tiny
    python scripts/train.py --config=configs/samba.py:size=421m --workdir=runs/samba-421m \
        --config.data.sources[0].path=slimpajama/ --config.data.tokenizer=llama-2.json

Options: size (below; tiny if left out), sequence_length, and the ablations of the paper:

    pattern=mamba-swa-mlp           one of PATTERNS below
    full_attention=1+5              Mamba and MLPs, with full attention for Mamba in the blocks 1 and 5, counted from 0

A published size keeps its tokens per step at any sequence_length.
"""

from ml_collections import ConfigDict

from lcx import recipes
from lcx.config import choose, default_config, parse_options
from lcx.errors import UserError

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


# The layers of one period; a variant has the sublayers of its size, but for those of PERIODS.
PATTERNS = {
    "samba": "mamba mlp swa mlp",
    "mamba-swa-mlp": "mamba swa mlp",
    "mamba-mlp": "mamba mlp",
    "swa-mlp": "swa mlp",
    "nope": "mamba mlp swa mlp",  # SAMBA without positions
    "two-windows": "mamba mlp swa mlp mamba mlp wide mlp",  # every second window is four times as wide
}
PERIODS = {("tiny", "mamba-swa-mlp"): 3, ("1.7b", "mamba-swa-mlp"): 18}  # the second is published, as 1.6B


def get_config(arg: str = "") -> ConfigDict:
    """The config of one size; `arg` is "size=421m,sequence_length=32768" or a part of it."""
    options = parse_options(arg, size="tiny", sequence_length=int, pattern="samba", full_attention="")
    size = choose("size", options["size"], SIZES)
    pattern = choose("pattern", options["pattern"], PATTERNS)

    config = default_config()
    model = config.model
    model.family = "samba"
    model.pattern = pattern
    model.periods = repeats(options["size"], options["pattern"])
    if options["full_attention"]:
        model.pattern, model.periods = with_full_attention(options, 2 * size["periods"]), 1
    model.mixers = {name: record for name, record in mixers(size).items() if name in model.pattern.split()}
    if options["pattern"] == "nope":
        model.mixers.swa.rope_base = None
    model.d_model = size["d_model"]
    model.vocab_size = size["vocab_size"]

    if options["size"] == "tiny":
        recipes.tiny(config, options["sequence_length"] or 512)
    else:
        recipes.slimpajama(config, options["sequence_length"] or 4096, **RECIPES[options["size"]])
    return config


def mixers(size: dict) -> dict[str, dict]:
    """The mixers that the patterns name."""
    heads = {"type": "attention", "num_heads": size["heads"], "num_kv_heads": size["kv_heads"]}
    return {
        "mamba": {"type": "mamba"},
        "mlp": {"type": "mlp", "d_ff": size["d_ff"]},
        "swa": heads | {"window": size["window"]},
        "wide": heads | {"window": 4 * size["window"]},
        "attention": heads,
    }


def repeats(size: str, pattern: str) -> int:
    """How often a pattern is repeated in a size. Raises UserError where that gives no whole number."""
    sublayers, layers = 4 * SIZES[size]["periods"], len(PATTERNS[pattern].split())
    if (size, pattern) in PERIODS:
        return PERIODS[size, pattern]
    if sublayers % layers:
        raise UserError(
            f"pattern={pattern} has {layers} layers, which do not divide the {sublayers} of size={size}; "
            "choose another size, or set model.pattern and model.periods."
        )
    return sublayers // layers


def with_full_attention(options: dict, blocks: int) -> str:
    """A whole model of Mamba and MLP blocks, with full attention for Mamba in the blocks that the option names."""
    try:
        chosen = {int(block) for block in options["full_attention"].split("+")}
    except ValueError:
        chosen = {-1}
    if not chosen <= set(range(blocks)) or options["pattern"] not in ("samba", "mamba-mlp"):
        raise UserError(
            f"full_attention={options['full_attention']}: write blocks from 0 to {blocks - 1} with + between them, "
            "and no other pattern than mamba-mlp."
        )
    return " ".join("attention mlp" if block in chosen else "mamba mlp" for block in range(blocks))
