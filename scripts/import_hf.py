"""Starts a run from pretrained weights: python scripts/import_hf.py --source=Llama-3.2-1B --workdir=runs/llama"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("import_hf"))
