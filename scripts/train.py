"""Trains a model: python scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/tiny"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("train"))
