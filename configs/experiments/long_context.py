"""Who retrieves and who extrapolates: six tiny models of equal size on passkeys and source code, in rows of 512 bytes.

    python scripts/sweep.py --config=configs/sweeps/long_context.py --workdir=runs/long_context
    python scripts/train.py --config=configs/experiments/long_context.py:model=samba --workdir=runs/samba

The first line is the whole experiment, three seeds of each; the second is one run of it. A run ends with its
evaluation: passkeys and perplexity from 512 to 16,384 bytes.

Options: model (a name of MODELS), seed, steps, learning_rate, and longest, the length that is evaluated last.

A quarter of the rows is the standard library's source code, three eighths are passkeys of three lengths, of which the
key alone counts. The rest teaches copying, without which nobody finds a key in so short a training: strings that come
twice, and passkeys of which every byte counts, for a key comes twice in its sentence.
"""

from ml_collections import ConfigDict

from lcx.config import choose, default_config, parse_options

LENGTH = 512  # of a row in training
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)  # that are evaluated
WINDOW = 64
WIDTH = 64
HEADS = {"num_heads": 4}

# All have the same width, and 245,000 parameters to half a percent.
MODELS = {
    "samba": dict(pattern="mamba mlp swa mlp", periods=2, d_ff=170),
    "mamba": dict(pattern="mamba", periods=7),
    "window": dict(pattern="swa mlp", periods=4, d_ff=212),
    "transformer": dict(pattern="attention mlp", periods=4, d_ff=212),
    "infini": dict(pattern="infini mlp", periods=4, d_ff=212),
    "sink": dict(pattern="sink mlp", periods=4, d_ff=212),
}
MIXERS = {
    "mamba": {"type": "mamba"},
    "mlp": {"type": "mlp"},
    "swa": {"type": "attention", "window": WINDOW} | HEADS,
    "attention": {"type": "attention"} | HEADS,
    "infini": {"type": "infini", "segment_length": WINDOW} | HEADS,
    "sink": {"type": "attention", "sink": "logit"} | HEADS,
}
PASSKEYS = (128, 256, 512)  # tokens of an example
DIGITS = 3
KEY_WEIGHT = 10.0  # of a key's token in the loss: there are three in a row, and 512 of source code


def get_config(arg: str = "") -> ConfigDict:
    """The config of one run; `arg` is "model=samba,seed=1" or a part of it."""
    options = parse_options(arg, model="samba", seed=0, steps=4800, learning_rate=3e-3, longest=16_384)
    chosen = dict(choose("model", options["model"], MODELS))
    mlp = {"d_ff": chosen.pop("d_ff", None)}

    config = default_config()
    config.model.update(family=options["model"], d_model=WIDTH, vocab_size=256, **chosen)
    names = dict.fromkeys(chosen["pattern"].split())
    config.model.mixers = {name: MIXERS[name] | (mlp if name == "mlp" else {}) for name in names}
    config.data.sources = [
        {"name": "python", "path": "stdlib", "weight": 1.0},
        synthetic("copying", "copying", 1.0, length=33),
        synthetic("sentences", "passkey", 0.5, length=128, digits=DIGITS, loss="all"),
        *(
            synthetic(f"passkey-{length}", "passkey", 0.5, KEY_WEIGHT, length=length, digits=DIGITS)
            for length in PASSKEYS
        ),
    ]
    config.data.seed = config.train.seed = options["seed"]
    config.train.update(steps=options["steps"], batch_size=4, sequence_length=LENGTH)
    config.optimizer.update(learning_rate=options["learning_rate"], warmup_steps=50)
    config.checkpoint.every = 200
    lengths = [length for length in LENGTHS if length <= options["longest"]]
    config.evaluation.update(max_rows=64, suites=["passkey", "perplexity"], chunk_size=512)
    config.evaluation.options = {
        "passkey": {"lengths": lengths, "depths": 5, "samples": 2, "digits": DIGITS, "style": "plain"},
        "perplexity": {"lengths": lengths, "documents": 4, "whole": 0},
    }
    return config


def synthetic(name: str, task: str, weight: float, loss_weight: float = 1.0, **options: int | str) -> dict:
    """A source of examples of a task."""
    source = {"name": name, "path": task, "format": "synthetic", "weight": weight, "loss_weight": loss_weight}
    return source | {"options": options | {"heldout": 0}}
