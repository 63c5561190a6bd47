"""Runs a sweep: python scripts/sweep.py --config=configs/sweeps/families.py --workdir=runs/families --jobs=2"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("sweep"))
