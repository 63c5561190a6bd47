"""Checks muP: python scripts/coordinates.py --config=F --workdir=W --config.model.mup_base_width=128"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("coordinates"))
