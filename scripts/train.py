"""Trains a model: python scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/tiny"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
