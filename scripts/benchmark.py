"""Times lcx beside its alternatives: python scripts/benchmark.py kernels --out=runs/benchmark"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
