"""Multi-query associative recall against the size of the state (Arora et al., arXiv 2312.04927), tiny.

    python scripts/sweep.py --config=configs/sweeps/recall.py --workdir=runs/recall
    python scripts/train.py --config=configs/experiments/recall.py:model=mamba,state=16 --workdir=runs/mamba-16

The first line is the whole experiment: models, states and learning rates. A row holds several examples of 64 symbols,
each with as many queries as pairs; only answers count. A run ends with its accuracy, evaluation/recall.json.

Options: model (a name of MODELS), state (of it: the numbers of a Mamba channel's or a Mamba-2 head's state, the tokens
of a window; full attention has none), pairs, seed, steps and learning_rate.
"""

from ml_collections import ConfigDict

from lcx.config import choose, default_config, parse_options

LENGTH, ROW = 64, 256  # symbols of an example, tokens of a row
WIDTH = 64
HEADS = {"type": "attention", "num_heads": 4}

# The mixer of each layer, and the option that is its state.
MODELS = {
    "mamba": ({"type": "mamba"}, "state_size"),
    "mamba2": ({"type": "mamba2", "head_dim": 32}, "state_size"),
    "window": (HEADS, "window"),
    "attention": (HEADS, None),
}


def get_config(arg: str = "") -> ConfigDict:
    """The config of one run; `arg` is "model=mamba,state=16" or a part of it."""
    options = parse_options(arg, model="mamba", state=16, pairs=12, seed=0, steps=1500, learning_rate=3e-3)
    record, name = choose("model", options["model"], MODELS)
    task = {"length": LENGTH, "pairs": options["pairs"], "queries": options["pairs"]}

    config = default_config()
    config.model.update(family=options["model"], pattern="mixer mlp", periods=2, d_model=WIDTH, vocab_size=256)
    config.model.mixers = {
        "mixer": record | ({name: options["state"]} if name else {}),
        "mlp": {"type": "mlp", "d_ff": 128},
    }
    source = {"name": "recall", "path": "associative_recall", "format": "synthetic", "options": task}
    config.data.sources = [source]
    config.data.seed = config.train.seed = options["seed"]
    config.train.update(steps=options["steps"], batch_size=16, sequence_length=ROW)
    config.optimizer.update(learning_rate=options["learning_rate"], warmup_steps=50)
    config.checkpoint.every = 500
    config.evaluation.update(suites=["recall"], batch_size=64)
    config.evaluation.options = {
        "recall": {
            "tasks": ["associative_recall"],
            "options": {"associative_recall": {"pairs": options["pairs"], "queries": options["pairs"]}},
            "lengths": [LENGTH, 2 * LENGTH, 4 * LENGTH],
            "samples": 256,
        }
    }
    return config
