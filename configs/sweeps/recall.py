"""Associative recall against the size of the state: four mixers, the best of three learning rates for each state.

    python scripts/sweep.py --config=configs/sweeps/recall.py --workdir=runs/recall

Options: steps.
"""

from lcx.config import parse_options

STATES = {"mamba": (2, 8, 32), "mamba2": (2, 8, 32), "window": (8, 16, 32), "attention": (0,)}


def get_sweep(arg: str = "") -> dict:
    """The sweep; `arg` is "steps=20" or empty."""
    steps = parse_options(arg, steps=2000)["steps"]
    return {
        "configs": {
            f"{model}-{state}" if state else model: f"configs/experiments/recall.py:{model=!s},{state=},{steps=}"
            for model, states in STATES.items()
            for state in states
        },
        "set": {"logging.tensorboard": False},
        "grid": {"optimizer.learning_rate": [3e-3, 1e-2, 3e-2]},
    }
