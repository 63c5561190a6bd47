"""Certifies a config on a mesh: python scripts/verify.py --config=F --mesh=data=2,seq=4 --workdir=W"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("verify"))
