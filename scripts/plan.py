"""Plans a config for hardware that is not here: python scripts/plan.py --config=F --hardware=v5p:4x4x4 --workdir=W"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("plan"))
