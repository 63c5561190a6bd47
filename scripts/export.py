"""Writes a trained model for other libraries: python scripts/export.py --workdir=runs/tiny --out=exports/tiny"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("export"))
