"""What the drills have shown is written down: .cache/drills/results, from which tests/drills/table.py makes a table."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

RESULTS = Path(".cache/drills/results")


@pytest.fixture
def record() -> Callable[[str, str, str], None]:
    """Writes down a result: (what was done, what came of it, what was wanted). Called once all of it has held."""

    def write(what: str, result: str, wanted: str) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in what)
        (RESULTS / f"{name}.json").write_text(json.dumps({"what": what, "result": result, "wanted": wanted}))

    return write


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Callable[..., Path]:
    """The workdir of an uninterrupted run of so many steps, made once."""
    from tests.drills.runs import Run

    made: dict[int, Path] = {}
    folder = tmp_path_factory.mktemp("drill")

    def run(steps: int) -> Path:
        if steps not in made:
            made[steps] = folder / f"undisturbed-{steps}"
            Run(made[steps], steps).finish()
        return made[steps]

    return run
