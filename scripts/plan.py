"""Plans a config for hardware that is not here: python scripts/plan.py --config=F --hardware=v5p:4x4x4 --workdir=W"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
