"""Starts a run from pretrained weights: python scripts/import_hf.py --source=Llama-3.2-1B --workdir=runs/llama"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["import_hf", *sys.argv[1:]]))
