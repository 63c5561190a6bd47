"""Branches of a warmup-stable-decay run: from several of its steps on, the learning rate decays to the end.

    python scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/stem --config.train.steps=2000 \
        --config.optimizer.schedule=wsd --config.optimizer.decay_fraction=0 --config.checkpoint.keep=100
    python scripts/sweep.py --config=configs/sweeps/branches.py:run=runs/stem,steps=500+1000 --workdir=runs/branches

One long run without its decay gives a whole model for each number of tokens (Hu et al. 2024, arXiv 2404.06395, section
4): a branch takes over the parameters, the optimizer's state and the place in the data of its step, and decays from
there. Options: run (a workdir), steps of it that have checkpoints, and decay (0.1), its share of a branch's steps.
"""

from lcx.config import parse_options
from lcx.errors import UserError


def get_sweep(arg: str = "") -> dict:
    """The sweep; `arg` is "run=runs/stem,steps=500+1000" and perhaps ",decay=0.2"."""
    options = parse_options(arg, run="runs/stem", steps="500+1000", decay=0.1)
    if not 0 < options["decay"] < 1:
        raise UserError(f"decay={options['decay']}: the share of a branch's steps that decay is between 0 and 1.")
    points = []
    for step in (int(step) for step in options["steps"].split("+")):
        total = max(step + 1, round(step / (1 - options["decay"])))
        points.append(
            {
                "name": f"from={step}",
                "checkpoint.fork": f"{options['run']}@{step}",
                "train.steps": total,
                "optimizer.schedule": "wsd",
                "optimizer.decay_fraction": (total - step) / total,
            }
        )
    return {"configs": {"branch": f"{options['run']}/config.json"}, "points": points}
