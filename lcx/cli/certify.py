"""What `lcx verify` does once there is a mesh: the laws, one after the other, on a config made small."""

import hashlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

import lcx
from lcx import laws
from lcx.config import Config
from lcx.errors import UserError
from lcx.laws.measure import Deviation, together
from lcx.laws.shrink import shrink
from lcx.laws.subject import spread
from lcx.laws.trials import trial_batch, trial_chunk, trial_lengths
from lcx.mixers import find_mixer
from lcx.models import LanguageModel
from lcx.models.pattern import parse_pattern
from lcx.parallel.sharding import parameter_shardings
from lcx.params import create
from lcx.training.train_state import blueprint
from lcx.training.train_step import make_gradients
from lcx.training.trainer import batch_shardings, check_batch
from lcx_kernels.backends import BACKENDS, compiling_for

EXACT = "bitwise"


@dataclass(frozen=True)
class Finding:
    """What came of one trial."""

    law: str
    compared: str
    allowed: float
    found: Deviation | None  # None: it ended in an error
    declared: str | None = None  # the mixer that declares to break this law
    error: str | None = None

    @property
    def holds(self) -> bool:
        return self.found is not None and self.found.value <= self.allowed

    @property
    def passed(self) -> bool:
        return self.holds or self.declared is not None

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        outcome = "holds" if self.holds else "BROKEN" if self.declared is None else "declared"
        where = self.error or ("" if self.holds and not self.found.value else self.found.where)
        if self.declared and self.holds:
            where = f"holds, though {self.declared} declares that it breaks this law"
        found = "" if self.found is None else f"{self.found.value:.1e}" if self.found.value else "0"
        return self.law, self.compared, f"{self.allowed:.0e}" if self.allowed else "0", found, outcome, where

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where a number that is not finite is null."""
        value = None if self.found is None or not math.isfinite(self.found.value) else self.found.value
        return {
            "law": self.law,
            "compared": self.compared,
            "allowed": self.allowed,
            "deviation": value,
            "where": self.found and self.found.where,
            "first": self.found and self.found.first_above(self.allowed),
            "holds": self.holds,
            "declared_by": self.declared,
            "passed": self.passed,
            "error": self.error,
        }


def certify(config: Config, mesh: Mesh, report: Callable[[Finding | str], None]) -> dict[str, Any]:
    """Tries all laws and returns what certificate.json holds, without the format version.

    Args:
      config: the user's. Its numbers are float64 and float32 here, whatever dtypes it names.
      mesh: of CPU devices; its first one is the device that it is compared with.
      report: is told each trial before it begins, and its finding.

    Raises UserError where the config cannot be trained on such a mesh.
    """
    with jax.default_device(mesh.devices.flat[0]), compiling_for("cpu"):
        whole, notes = on_cpu(config)
        declared = laws.declared_exceptions(mixers_of(whole))
        check_fits(replace(whole, model=replace(whole.model, **DTYPES["float32"])), mesh)
        findings, small = [], {}

        def attempt(law: str, compared: str, allowed: float, trial: Callable[[], Deviation]) -> None:
            report(f"{law}: {compared}")
            try:
                found, error = trial(), None
            except Exception as problem:  # a user's mixer may raise anything: then the law does not hold
                traceback.print_exc()
                found, error = None, f"{type(problem).__name__}: {problem}".splitlines()[0]
            findings.append(Finding(law, compared, allowed, found, declared.get(law), error))
            report(findings[-1])

        with jax.enable_x64(True):
            small = shrink(whole, mesh.shape, "float64", lambda config: check_fits(config, mesh))
            try_stack(small, mesh, attempt)
            attempt("sharding", "loss and gradients of training, on the mesh", 1e-9, lambda: training(small, mesh))
        narrow = replace(small, model=replace(small.model, **DTYPES["float32"]))
        compared = "the same in float32"
        attempt("sharding", compared, laws.TOLERANCE["float32"], lambda: training(narrow, mesh))
    return {
        "passed": all(finding.passed for finding in findings),
        "config_hash": config_hash(config),
        "mesh": dict(mesh.shape),
        "jax_version": jax.__version__,
        "lcx_version": lcx.__version__,
        "notes": notes,
        "laws": [finding.to_dict() for finding in findings],
        "tried": small.to_dict(),
    }
