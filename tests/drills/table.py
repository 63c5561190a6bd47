"""Puts what the drills have shown into docs/reliability.md: python tests/drills/table.py, after make drills."""

import json
from pathlib import Path

BEGIN, END = "<!-- drills: begin -->\n", "<!-- drills: end -->"
PAGE, RESULTS = Path("docs/reliability.md"), Path(".cache/drills/results")


def table() -> str:
    """The results, a row each."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [f"| {row['what']} | {row['wanted']} | {row['result']} |" for row in rows]
    return "\n".join(["| drill | wanted | shown |", "| --- | --- | --- |", *lines]) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
