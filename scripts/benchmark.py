"""Times lcx beside its alternatives: python scripts/benchmark.py kernels --out=runs/benchmark"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("benchmark"))
