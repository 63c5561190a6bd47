"""A search over learning rate and weight decay, for each family by itself.

    python scripts/sweep.py --config=configs/sweeps/search.py --workdir=runs/search --jobs=2

Options: families (transformer+mamba), trials of each (16), steps of a trial (200).
"""

from lcx.config import parse_options


def get_sweep(arg: str = "") -> dict:
    """The sweep; `arg` is "families=samba,trials=30" or a part of it."""
    options = parse_options(arg, families="transformer+mamba", trials=16, steps=200)
    return {
        "configs": {family: f"configs/{family}.py:size=tiny" for family in options["families"].split("+")},
        "set": {"train.steps": options["steps"], "logging.tensorboard": False},
        "search": {
            "space": {
                "optimizer.learning_rate": {"low": 3e-4, "high": 3e-2, "log": True},
                "optimizer.weight_decay": {"low": 0.0, "high": 0.3},
            },
            "trials": options["trials"],
        },
    }
