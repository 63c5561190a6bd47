"""The table of suites. A type is a name of the table or an import path, "my_package.suites.mine": a module with Options
and run, as `lcx.evaluation.suite` says."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from lcx.errors import UserError, suggest
from lcx.evaluation.suite import Finding, Material, Suite
from lcx.models import LanguageModel
from lcx.schema import build

SUITES = (
    "babilong",
    "cache",
    "entropy",
    "heads",
    "longbench",
    "needle",
    "passkey",
    "perplexity",
    "recall",
    "ruler",
    "state",
)


def find_suite(name: str) -> Suite:
    """The suite of a name. Raises UserError for one that is not in the table, or an import path without a suite."""
    if name in SUITES:
        return importlib.import_module(f"lcx.evaluation.suites.{name}")
    if "." not in name:
        raise UserError(f'evaluation.suites: unknown suite "{name}": {suggest(name, SUITES)}')
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'evaluation.suites: cannot import "{name}" ({error}).') from error
    if not (hasattr(found, "run") and hasattr(found, "Options")):
        raise UserError(f'evaluation.suites: "{name}" is no suite: it needs Options and run.')
    return found


def read_options(name: str, values: Mapping[str, Any]) -> Any:
    """A suite's options as its dataclass. Raises UserError for an unknown one, with the nearest match."""
    return build(find_suite(name).Options, dict(values), f"evaluation.options.{name}")


def run(name: str, model: LanguageModel, options: Any, material: Material) -> Iterator[Finding]:
    """What a suite finds, as it finds it; options as of `read_options`. Raises UserError as the suite does."""
    return find_suite(name).run(model, options, material)
