"""`lcx benchmark`: times lcx beside what a user would pick instead, and prints ratios."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from etils import epath

from lcx.cli.flags import Flag, parse
from lcx.errors import UserError, suggest
from lcx.files import write_bytes, write_json

SUMMARY = (
    "Times lcx beside its alternatives in one run: lcx benchmark kernels (or train, decode, scaling, compile, "
    "hardware). Machines are noisy: trust the ratios."
)
FLAGS = [
    Flag("rounds", "how often each contestant takes its turn", kind=int, default=15, limits={"lower_bound": 1}),
    Flag("easydel", "train: a Python that has EasyDeL, which is then timed too (it needs other versions than lcx)"),
    Flag("out", "a folder for the report as JSON and Markdown; nothing is written without it"),
]
Parts = tuple[Callable[[int], list], ...]  # each makes results of a number of rounds


def _kernels(_: Any) -> Parts:
    from lcx.benchmarks.attention import attention_results  # takes seconds: JAX
    from lcx.benchmarks.kernels import scan_results
    from lcx.benchmarks.memory import memory_results

    return scan_results, attention_results, memory_results


def _train(values: Any) -> Parts:
    from lcx.benchmarks.overhead import EVERY, TURN, overhead_results
    from lcx.benchmarks.rates import rate_results
    from lcx.benchmarks.train import train_results
    from lcx.cli.run import opened
    from lcx.config import Config, load_config
    from lcx.training.trainer import fit

    def overhead(rounds: int) -> list:
        config = load_config("configs/quickstart.py")
        config.train.steps = (rounds + 1) * EVERY
        config.checkpoint.every, config.evaluation.every = EVERY, TURN
        return overhead_results(run, Config.from_dict(config), rounds)

    def run(config: Config, workdir: str, evaluate: Callable) -> None:
        with opened(config, workdir) as made:
            fit(made.programs, replace(made.around, evaluate=evaluate))

    return partial(train_results, easydel=values.easydel), rate_results, overhead


def _decode(_: Any) -> Parts:
    from lcx.benchmarks.decode import decode_results

    return (decode_results,)


def _scaling(_: Any) -> Parts:
    from lcx.benchmarks.scaling import scaling_results

    return (scaling_results,)


def _compile(_: Any) -> Parts:
    from lcx.benchmarks.startup import startup_results

    return (startup_results,)


def _hardware(values: Any) -> Parts:
    import jax

    from lcx.benchmarks.hardware import hardware_results
    from lcx.config import Config, load_config

    small = jax.default_backend() == "cpu"
    config = load_config("configs/samba.py:size=tiny,sequence_length=64" if small else "configs/samba.py:size=421m")
    config.train.batch_size = 2 if small else 4
    profile = None if values.out is None else f"{values.out}/profile"
    return (partial(hardware_results, Config.from_dict(config), profile),)


def _health(_: Any) -> Parts:
    from lcx.benchmarks.health import health_results

    return (health_results,)


# Each takes the values of the flags, and gives its parts.
SUITES = {
    "kernels": _kernels,
    "train": _train,
    "decode": _decode,
    "scaling": _scaling,
    "compile": _compile,
    "health": _health,
    "hardware": _hardware,
}


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    suites = [word for word in argv if not word.startswith("-")]
    values = parse("benchmark", SUMMARY, FLAGS, [word for word in argv if word.startswith("-")])
    if len(suites) != 1 or suites[0] not in SUITES:
        name = suites[0] if suites else ""
        raise UserError(f'lcx benchmark: say which suite, not "{name}": {suggest(name, SUITES)}')
    folder = None if values.out is None else _folder(values.out)  # before minutes are spent
    from lcx.benchmarks import harness

    results = []
    for part in SUITES[suites[0]](values):
        for result in part(values.rounds):
            print(harness.line(result), flush=True)
            results.append(result)
    report = harness.markdown(suites[0], results)
    print(f"\n{report}")
    for result in results:
        if result.details:
            print(f"{result.name}: {json.dumps(result.details)}")
    if folder is not None:
        record = {"machine": harness.machine(), "results": [asdict(result) for result in results]}
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
