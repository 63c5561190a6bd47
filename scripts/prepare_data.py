"""Prepares a corpus: python scripts/prepare_data.py --input=my_corpus/ --out=prepared/"""

import sys

from lcx.cli.start import start

if __name__ == "__main__":
    sys.exit(start("prepare_data"))
