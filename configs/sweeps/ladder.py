"""An iso-FLOP ladder: for each budget several sizes of each family, and the parabola whose minimum is the best size.

    python scripts/sweep.py --config=configs/sweeps/ladder.py --workdir=runs/ladder --jobs=2

Options: families (transformer+mamba+samba), budgets in FLOPs (1e12+3e12+1e13), sizes in parameters (2e5+4e5+8e5+1.6e6),
sequence_length (256) and batch_size (8). The steps of a trial follow from its budget.
"""

from lcx.config import parse_options


def get_sweep(arg: str = "") -> dict:
    """The sweep; `arg` is "families=mamba,budgets=1e13+1e14" or a part of it."""
    options = parse_options(
        arg,
        families="transformer+mamba+samba",
        budgets="1e12+3e12+1e13",
        sizes="2e5+4e5+8e5+1.6e6",
        sequence_length=256,
        batch_size=8,
    )
    return {
        "configs": {family: f"configs/{family}.py:size=tiny" for family in options["families"].split("+")},
        "set": {
            "train.sequence_length": options["sequence_length"],
            "train.batch_size": options["batch_size"],
            "logging.tensorboard": False,
        },
        "match": "parameters",
        "vary": "both",
        "sizes": [float(size) for size in options["sizes"].split("+")],
        "budgets": [float(budget) for budget in options["budgets"].split("+")],
    }
