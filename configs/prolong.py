"""ProLong's two stages of continued training on long documents (Gao et al. 2024, arXiv 2410.02660).

    python scripts/prepare_data.py --input=raw/books --out=prolong/books --tokenizer=llama-3.json   # and the others
    python scripts/train.py --config=configs/prolong.py:size=1.3b,data=prolong --workdir=runs/prolong \
        --config.data.tokenizer=llama-3.json --config.model.vocab_size=128256
    python scripts/train.py --config=configs/prolong.py --inspect_data=2

Options: size (a size of configs/transformer.py; tiny if left out), sequence_length (of the first stage), data (a folder
with one folder of prepared data for each source; without it Python's standard library and a synthetic task stand in).

Published: mixtures, lengths, tokens a step, steps and RoPE bases of both stages, and the first stage's schedule. The
paper starts each stage with a schedule of its own (5e-6 at the peak of the second); here one schedule spans both.
"""

from pathlib import Path

from ml_collections import ConfigDict

from lcx.config import load_config, parse_options

TRANSFORMER = Path(__file__).parent / "transformer.py"

# Shares of the rows in both stages, which differ in how code and books are cut.
SHORT = {
    "fineweb-edu": 0.1,
    "fineweb": 0.1,
    "stackexchange": 0.04,
    "wikipedia": 0.04,
    "tulu-v2": 0.03,
    "arxiv": 0.03,
    "openwebmath": 0.03,
    "textbooks": 0.03,
}
FIRST = SHORT | {"code": 0.3, "books": 0.3}
SECOND = SHORT | {"code-long": 0.15, "code": 0.15, "books-long": 0.05, "books": 0.25}


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is "size=1.3b,data=prolong" or a part of it."""
    options = parse_options(arg, size="tiny", sequence_length=int, data="")
    config = load_config(f"{TRANSFORMER}:size={options['size']}")
    config.data.packing = "best_fit"
    if options["data"]:
        published(config, options["data"], options["sequence_length"] or 2**16)
    else:
        tiny(config, options["sequence_length"] or 256)
    return config


def published(config: ConfigDict, folder: str, length: int) -> None:
    """5,000 steps of 4M tokens in rows of 64K, then 2,500 of 8M in rows of 512K."""
    only_long = {"0": 0, str(8 * length): 1}  # documents that fill a row of the second stage
    rows = max(1, 2**22 // length)
    config.data.sources = [
        {"name": name, "path": f"{folder}/{name.removesuffix('-long')}", "format": "prepared"}
        | ({"length_weights": only_long} if name.endswith("-long") else {})
        for name in FIRST | SECOND
    ]
    config.train.update(steps=7500, batch_size=rows, sequence_length=length)
    config.train.stages = [
        {"step": 0, "rope_base": 8e6, "weights": FIRST},
        {
            "step": 5000,
            "rope_base": 1.28e8,
            "weights": SECOND,
            "batch_size": max(1, rows // 4),
            "sequence_length": 8 * length,
        },
    ]
    config.optimizer.update(learning_rate=1e-5, warmup_steps=500, final_ratio=0.1)
    config.model.remat = {name: "full" for name in config.model.mixers}


def tiny(config: ConfigDict, length: int) -> None:
    """The same shape in a minute: rows of 256, then of 1,024, and twice as many files that fill one."""
    recall = {"name": "recall", "path": "passkey", "format": "synthetic", "options": {"length": length + 1}}
    config.data.sources = [{"name": "code", "path": "stdlib", "length_weights": {str(4 * length): 2}}, recall]
    config.train.update(steps=200, batch_size=16, sequence_length=length)
    longer = {"batch_size": 8, "sequence_length": 4 * length}
    config.train.stages = [
        {"step": 0, "rope_base": 5e4, "weights": {"code": 0.6, "recall": 0.4}},
        {"step": 150, "rope_base": 5e5, "weights": {"code": 0.9, "recall": 0.1}} | longer,
    ]
