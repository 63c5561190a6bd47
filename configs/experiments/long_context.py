"""Who retrieves and who extrapolates: six tiny models of equal size on passkeys and source code, in rows of 512 bytes.

    python scripts/train.py --config=configs/experiments/long_context.py:model=samba,seed=0 --workdir=runs/samba-0
    python scripts/evaluate.py --workdir=runs/samba-0 --suite=passkey,perplexity

Options: model (a name of MODELS), seed, steps and learning_rate.

A third of the rows is the standard library's source code, the rest are passkeys of three lengths, the short ones to be
learned first. Every byte counts: the key comes twice in its sentence, and to copy it there is where models begin.
"""

from ml_collections import ConfigDict

from lcx.config import choose, default_config, parse_options

LENGTH = 512
WINDOW = 64
WIDTH = 64
HEADS = {"num_heads": 4}
MLP = {"type": "mlp", "d_ff": 192}

# Each has the same width and about the same number of parameters.
MODELS = {
    "samba": dict(pattern="mamba mlp swa mlp", periods=2),
    "mamba": dict(pattern="mamba", periods=7),
    "window": dict(pattern="swa mlp", periods=4),
    "transformer": dict(pattern="attention mlp", periods=4),
    "infini": dict(pattern="infini mlp", periods=4),
    "sink": dict(pattern="sink mlp", periods=4),
}
MIXERS = {
    "mamba": {"type": "mamba"},
    "mlp": MLP,
    "swa": {"type": "attention", "window": WINDOW} | HEADS,
    "attention": {"type": "attention"} | HEADS,
    "infini": {"type": "infini", "segment_length": WINDOW} | HEADS,
    "sink": {"type": "attention", "sink": "logit"} | HEADS,
}
PASSKEYS = (128, 256, 512)  # tokens of an example
DIGITS = 3


def get_config(arg: str = "") -> ConfigDict:
    """The config of one run; `arg` is "model=samba,seed=1" or a part of it."""
    options = parse_options(arg, model="samba", seed=0, steps=1200, learning_rate=3e-3)
    chosen = choose("model", options["model"], MODELS)

    config = default_config()
    config.model.update(family=options["model"], d_model=WIDTH, vocab_size=256, **chosen)
    config.model.mixers = {name: MIXERS[name] for name in dict.fromkeys(chosen["pattern"].split())}
    config.data.sources = [{"name": "python", "path": "stdlib", "weight": 1.0}] + [
        {
            "name": f"passkey-{length}",
            "path": "passkey",
            "format": "synthetic",
            "weight": 2 / len(PASSKEYS),
            "options": {"length": length, "digits": DIGITS, "loss": "all", "heldout": 0},
        }
        for length in PASSKEYS
    ]
    config.data.seed = config.train.seed = options["seed"]
    config.train.update(steps=options["steps"], batch_size=16, sequence_length=LENGTH)
    config.optimizer.update(learning_rate=options["learning_rate"], warmup_steps=50)
    config.checkpoint.every = 200
    return config
