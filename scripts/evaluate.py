"""Evaluates a trained model: python scripts/evaluate.py --workdir=runs/tiny --suite=passkey,perplexity"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))
