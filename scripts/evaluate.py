"""Evaluates a trained model: python scripts/evaluate.py --workdir=runs/tiny --suite=passkey,perplexity"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
