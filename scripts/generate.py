"""Writes text with a trained model: python scripts/generate.py --workdir=runs/tiny --prompt='def main('"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
