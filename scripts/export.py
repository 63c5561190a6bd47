"""Writes a trained model for other libraries: python scripts/export.py --workdir=runs/tiny --out=exports/tiny"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
