"""Multi-query associative recall against the size of the state (Arora et al., arXiv 2312.04927), tiny.

    python scripts/sweep.py --config=configs/sweeps/recall.py --workdir=runs/recall
    python scripts/train.py --config=configs/experiments/recall.py:model=mamba,state=16 --workdir=runs/mamba-16

The first line is the whole experiment: models, states and learning rates. A row holds examples of 2, 4, 8 and 16 pairs
of 32 keys and 32 values, with three queries a pair; only answers count. A run ends with its accuracy at 16 pairs, of
keys that are asked for the first time, evaluation/recall.json.

Options: model (a name of MODELS), state (of it: the numbers of a Mamba channel's or a Mamba-2 head's state, the tokens
of a window; full attention has none), seed, steps and learning_rate.
"""

from ml_collections import ConfigDict

from lcx.config import choose, default_config, parse_options

PAIRS = (2, 4, 8, 16)  # of an example; without the small ones nobody learns the large ones in so short a time
SYMBOLS = 64
WIDTH = 64
HEADS = {"type": "attention", "num_heads": 4}

# The pattern of two layers, the mixer of which "mixer" is the name, and the option that is its state. Where there is no
# convolution that brings a key and its value together, the first layer does, which sees one token back.
MODELS = {
    "mamba": ("mixer mlp mixer mlp", {"type": "mamba"}, "state_size"),
    "mamba2": ("mixer mlp mixer mlp", {"type": "mamba2", "head_dim": 32}, "state_size"),
    "window": ("near mlp mixer mlp", HEADS, "window"),
    "attention": ("near mlp mixer mlp", HEADS, None),
}
OTHERS = {"near": HEADS | {"window": 2}, "mlp": {"type": "mlp", "d_ff": 128}}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one run; `arg` is "model=mamba,state=16" or a part of it."""
    options = parse_options(arg, model="mamba", state=16, seed=0, steps=2000, learning_rate=1e-2)
    pattern, record, name = choose("model", options["model"], MODELS)
    mixers = OTHERS | {"mixer": record | ({name: options["state"]} if name else {})}

    config = default_config()
    config.model.update(family=options["model"], pattern=pattern, periods=1, d_model=WIDTH, vocab_size=256)
    config.model.mixers = {key: mixers[key] for key in pattern.split()}
    config.data.sources = [source(pairs) for pairs in PAIRS]
    config.data.seed = config.train.seed = options["seed"]
    config.train.update(steps=options["steps"], batch_size=16, sequence_length=256)
    config.optimizer.update(learning_rate=options["learning_rate"], warmup_steps=50)
    config.health.threshold = 1e6  # once recall is learned, losses are near 0 and any mistake is a spike
    config.checkpoint.every = 500
    most, asked = max(PAIRS), 4
    task = {"pairs": most, "queries": asked, "symbols": SYMBOLS}
    config.evaluation.update(suites=["recall"], batch_size=64)
    config.evaluation.options = {
        "recall": {
            "tasks": ["associative_recall"],
            "options": {"associative_recall": task},
            "lengths": [2 * (most + asked)],
            "samples": 512,
        }
    }
    return config


def source(pairs: int) -> dict:
    """Examples of so many pairs, without blanks; their keys are asked again and again (see the task)."""
    queries = 3 * pairs
    task = {"length": 2 * (pairs + queries), "pairs": pairs, "queries": queries, "symbols": SYMBOLS}
    return {"name": f"recall_{pairs}", "path": "associative_recall", "format": "synthetic", "options": task}
