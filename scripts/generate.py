"""Writes text with a trained model: python scripts/generate.py --workdir=runs/tiny --prompt='def main('"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("generate"))
