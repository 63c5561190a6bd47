"""`lcx benchmark`: times lcx beside what a user would pick instead, and prints ratios."""

import json
from collections.abc import Sequence
from pathlib import Path

from lcx.cli.flags import Flag, parse
from lcx.errors import UserError, suggest

SUMMARY = "Times lcx beside its alternatives in one run: lcx benchmark kernels. Machines are noisy: trust the ratios."
FLAGS = [
    Flag("rounds", "how often each contestant takes its turn", kind=int, default=15, limits={"lower_bound": 1}),
    Flag("out", "a folder for the report as JSON and Markdown; nothing is written without it"),
]
SUITES = ("kernels",)


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    suites = [word for word in argv if not word.startswith("-")]
    values = parse("benchmark", SUMMARY, FLAGS, [word for word in argv if word.startswith("-")])
    if len(suites) != 1 or suites[0] not in SUITES:
        name = suites[0] if suites else ""
        raise UserError(f'lcx benchmark: say which suite, not "{name}": {suggest(name, SUITES)}')
    from lcx.benchmarks import harness  # takes seconds: JAX
    from lcx.benchmarks.kernels import scan_results

    results = scan_results(values.rounds)
    report = harness.markdown(suites[0], results)
    print(report)
    for result in results:
        if result.details:
            print(f"{result.name}: {json.dumps(result.details)}")
    if values.out:
        folder = Path(values.out)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"format_version": 1, "machine": harness.machine(), "results": [vars(result) for result in results]}
        (folder / f"{suites[0]}.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / f"{suites[0]}.md").write_text(report)
    return 0
