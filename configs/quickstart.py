"""The quickstart: the tiny SAMBA on the source code of Python's standard library, a few minutes on two CPU cores.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Options: sequence_length.
"""

from pathlib import Path

from ml_collections import ConfigDict

from lcx.config import load_config, parse_options

SAMBA = Path(__file__).parent / "samba.py"


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` is "sequence_length=256" or nothing."""
    options = parse_options(arg, sequence_length=512)
    config = load_config(f"{SAMBA}:size=tiny,sequence_length={options['sequence_length']}")
    config.train.steps = 240
    config.logging.every = 5
    config.evaluation.max_rows = 0  # all that is held out
    config.model.remat = {"mlp": "full"}  # a sixth faster here: memory is the bottleneck, not arithmetic
    return config
