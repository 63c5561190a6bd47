"""Certifies a config on a mesh: python scripts/verify.py --config=F --mesh=data=2,seq=4 --workdir=W"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
