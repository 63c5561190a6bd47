"""The long-context experiment: six models, three seeds, one training length, evaluated up to 32 times as far.

    python scripts/sweep.py --config=configs/sweeps/long_context.py --workdir=runs/long_context

Options: steps, longest and seeds, for a smaller one.
"""

from lcx.config import parse_options

MODELS = ("samba", "mamba", "window", "transformer", "infini", "sink")


def get_sweep(arg: str = "") -> dict:
    """The sweep; `arg` is "steps=20,longest=1024,seeds=1" or a part of it."""
    options = parse_options(arg, steps=4800, longest=16_384, seeds=3)
    how = f"steps={options['steps']},longest={options['longest']}"
    return {
        "configs": {model: f"configs/experiments/long_context.py:model={model},{how}" for model in MODELS},
        "set": {"logging.tensorboard": False},
        "grid": {"train.seed": list(range(options["seeds"]))},
    }
