"""`lcx benchmark`: times lcx beside what a user would pick instead, and prints ratios."""

import json
from collections.abc import Callable, Sequence

from etils import epath

from lcx.cli.flags import Flag, parse
from lcx.errors import UserError, suggest
from lcx.files import write_bytes, write_json

SUMMARY = "Times lcx beside its alternatives in one run: lcx benchmark kernels. Machines are noisy: trust the ratios."
FLAGS = [
    Flag("rounds", "how often each contestant takes its turn", kind=int, default=15, limits={"lower_bound": 1}),
    Flag("out", "a folder for the report as JSON and Markdown; nothing is written without it"),
]


def _kernels() -> tuple[Callable[[int], list], ...]:
    from lcx.benchmarks.attention import attention_results  # takes seconds: JAX
    from lcx.benchmarks.kernels import scan_results
    from lcx.benchmarks.memory import memory_results

    return scan_results, attention_results, memory_results


def _health() -> tuple[Callable[[int], list], ...]:
    from lcx.cli.benchmark_health import health_results  # likewise

    return (health_results,)


SUITES = {"kernels": _kernels, "health": _health}  # each gives its parts, which make results of a number of rounds


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    suites = [word for word in argv if not word.startswith("-")]
    values = parse("benchmark", SUMMARY, FLAGS, [word for word in argv if word.startswith("-")])
    if len(suites) != 1 or suites[0] not in SUITES:
        name = suites[0] if suites else ""
        raise UserError(f'lcx benchmark: say which suite, not "{name}": {suggest(name, SUITES)}')
    folder = None if values.out is None else _folder(values.out)  # before minutes are spent
    from lcx.benchmarks import harness

    results = [result for part in SUITES[suites[0]]() for result in part(values.rounds)]
    report = harness.markdown(suites[0], results)
    print(report)
    for result in results:
        if result.details:
            print(f"{result.name}: {json.dumps(result.details)}")
    if folder is not None:
        record = {"machine": harness.machine(), "results": [vars(result) for result in results]}
        write_json(folder / f"{suites[0]}.json", record)
        write_bytes(folder / f"{suites[0]}.md", report.encode())
    return 0


def _folder(path: str) -> epath.Path:
    """The folder, made if it is not there. Raises UserError where it cannot be."""
    folder = epath.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}.") from error
    return folder
