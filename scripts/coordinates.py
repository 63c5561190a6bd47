"""Checks muP: python scripts/coordinates.py --config=F --workdir=W --config.model.mup_base_width=128"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["coordinates", *sys.argv[1:]]))
