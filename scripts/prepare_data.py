"""Prepares a corpus: python scripts/prepare_data.py --input=my_corpus/ --out=prepared/"""

import sys

from lcx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare_data", *sys.argv[1:]]))
