"""Suites on a model, found once or inside training: run, said, written down."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from lcx.cli.material import make_material
from lcx.cli.variant import Trained
from lcx.config import EvaluationConfig
from lcx.evaluation import suites
from lcx.evaluation.results import Board, Result, save
from lcx.evaluation.suite import Material
from lcx.models import LanguageModel

SHOWN = 6  # numbers of a suite that are printed; all are in its file


def check_suites(config: EvaluationConfig) -> dict[str, Any]:
    """The options of each suite that a config names. Raises UserError for what cannot be run."""
    return {name: suites.read_options(name, config.options.get(name, {})) for name in config.suite_names}


def find(
    model: LanguageModel, config: EvaluationConfig, material: Material, say: Callable[[str], None]
) -> Iterator[tuple[str, Result]]:
    """Each suite that a config names with its result, as soon as it is there. Raises UserError as the suites do."""
    for name, options in check_suites(config).items():
        begun = time.perf_counter()
        result = Result.of(suites.run(name, model, options, material))
        say(f"{name} ({time.perf_counter() - begun:.0f} s): {_summary(result)}")
        yield name, result


def run_suites(trained: Trained, out: epath.PathLike | None, say: Callable[[str], None]) -> None:
    """The suites of a config on a model that is here, written to `out` or into its workdir."""
    folder = epath.Path(out) if out else trained.folder / "evaluation"
    board = trained.folder / "tensorboard" / "evaluation" if trained.config.logging.tensorboard and not out else None
    evaluation = trained.config.evaluation
    for name, result in find(trained.model, evaluation, make_material(trained.config), say):
        keep({name: result}, folder, board, trained.step, evaluation, trained.variant)  # what a later suite cannot lose
    say(f"written to {folder}")


def keep(
    results: Mapping[str, Result],
    folder: epath.PathLike,
    board: epath.PathLike | None,
    step: int,
    config: EvaluationConfig,
    variant: str = "",
) -> None:
    """Writes results down: <suite>.json and .png, <suite>@<variant> for a variant, and TensorBoard."""
    if not results:
        return
    with Board(board) as writer:
        for suite, result in results.items():
            name = f"{suite}@{variant}" if variant else suite
            about = {"suite": suite, "variant": variant, "options": dict(config.options.get(suite, {}))}
            save(folder, name, result, step, about)
            writer.log(name, result, step)


def _summary(result: Result) -> str:
    shown = [f"{name} {value:.4g}" for name, value in list(result.scalars.items())[:SHOWN]]
    more = len(result.scalars) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
