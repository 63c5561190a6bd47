"""Five families at tiny size, over learning rates and seeds.

    python scripts/sweep.py --config=configs/sweeps/families.py --workdir=runs/families --jobs=2

Options: steps (200), sequence_length (512), batch_size (8), seeds (2), and match (parameters, flops or tokens; nothing
is matched if left out).
"""

from lcx.config import parse_options

FAMILIES = ("transformer", "mamba", "samba", "infini", "sink")


def get_sweep(arg: str = "") -> dict:
    """The sweep; `arg` is "steps=50,match=parameters" or a part of it."""
    options = parse_options(arg, steps=200, sequence_length=512, batch_size=8, seeds=2, match=str)
    return {
        "configs": {family: f"configs/{family}.py:size=tiny" for family in FAMILIES},
        "set": {
            "train.steps": options["steps"],
            "train.sequence_length": options["sequence_length"],
            "train.batch_size": options["batch_size"],
            "logging.tensorboard": False,
        },
        "grid": {
            "optimizer.learning_rate": [1e-3, 3e-3, 1e-2],
            "train.seed": list(range(options["seeds"])),
        },
        "match": options["match"],
        "sizes": [1e6] if options["match"] == "parameters" else [],
    }
