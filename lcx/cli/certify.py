"""What `lcx verify` does once there is a mesh: the laws, one after the other, on a config made small."""

import hashlib
import itertools
import json
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import lcx
from lcx import laws
from lcx.config import Config
from lcx.errors import UserError
from lcx.laws.measure import Deviation, together
from lcx.laws.shrink import shrink
from lcx.laws.subject import spread
from lcx.laws.trials import trial_batch, trial_chunk, trial_lengths
from lcx.mixers import Mixer, find_mixer
from lcx.models import LanguageModel
from lcx.models.pattern import parse_pattern
from lcx.parallel.sharding import activation_sharding, batch_shards, parameter_shardings
from lcx.params import create
from lcx.training.train_state import blueprint
from lcx.training.train_step import make_gradients
from lcx.training.trainer import BATCH_AXES, check_batch
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
        config_here, notes = on_cpu(config)
        check_fits(with_dtype(config_here, "float32"), mesh)
        trials = Trials(laws.declared_exceptions(mixers_of(config_here)), report)
        with jax.enable_x64(True):
            small = shrink(with_dtype(config_here, "float64"), mesh.shape, lambda config: check_fits(config, mesh))
            try_stack(trials, small, mesh)
            trials.add("sharding", "training: loss and gradients", "float64", lambda: training(small, mesh))
        narrow = with_dtype(small, "float32")
        trials.add("sharding", "training in float32", "float32", lambda: training(narrow, mesh))
    return {
        "passed": all(finding.passed for finding in trials.findings),
        "config_hash": config_hash(config),
        "mesh": dict(mesh.shape),
        "jax_version": jax.__version__,
        "lcx_version": lcx.__version__,
        "laws": [finding.to_dict() for finding in trials.findings],
        "notes": notes,
        "tried": small.to_dict(),
    }


@dataclass
class Trials:
    """Runs trials and keeps what came of them."""

    declared: Mapping[str, str]  # laws that some mixer declares to break, and which
    report: Callable[[Finding | str], None]
    findings: list[Finding] = field(default_factory=list)

    def add(self, law: str, compared: str, allowed: str, trial: Callable[[], Deviation]) -> None:
        """Tries a law. allowed: what rounding in a dtype may do, or nothing (EXACT)."""
        self.report(f"{law}: {compared}")
        tolerance = 0.0 if allowed == EXACT else laws.TOLERANCE[allowed]
        try:
            found, error = trial(), None
        except UserError:
            raise
        except Exception as problem:  # a mixer may raise anything: then the law does not hold
            traceback.print_exc()
            found, error = None, f"{type(problem).__name__}: {problem}".splitlines()[0]
        self.findings.append(Finding(law, compared, tolerance, found, self.declared.get(law), error))
        self.report(self.findings[-1])


def try_stack(trials: Trials, config: Config, mesh: Mesh) -> None:
    """The laws of the model's stack, from states that hold tokens."""
    rules = blueprint(config).rules
    subject = laws.stack_subject("stack", config.model)
    time, rows = 2 * config.train.sequence_length, config.train.batch_size // config.train.accumulate
    chunk = trial_chunk(subject, time, rows, batch_shards(mesh, rules))
    chunks = {"": chunk, " at first": laws.from_nothing(subject, chunk)}
    by_row = [[document for document in chunk.documents if document.row == row] for row in range(rows)]
    on_mesh = subject.on(mesh, rules)
    reference = laws.stack_subject("reference", with_backend(config, "reference").model)

    def causality() -> Deviation:
        """Up to the last token of a shard of time, and up to others early and late."""
        tries = itertools.product((time // 8, time // 2 - 1, time - 3), chunks)
        return together({f"up to {last}{name}": laws.causality(on_mesh, chunks[name], last) for last, name in tries})

    def isolation() -> Deviation:
        kept = {place: [documents[place % len(documents)] for documents in by_row] for place in (0, 2)}
        kept = {f"document {place}{name}": (kept[place], name) for place in kept for name in chunks}
        return together(
            {key: laws.isolation_bitwise(on_mesh, chunks[name], kept) for key, (kept, name) in kept.items()}
        )

    def sharding(name: str) -> Callable[[], Deviation]:
        return lambda: laws.sharding(subject, chunks[name], mesh, rules)

    trials.add("sharding", "mesh and one device, from a state", "float64", sharding(""))
    trials.add("sharding", "mesh and one device, from none", "float64", sharding(" at first"))
    trials.add("causality", "later tokens changed, on the mesh", EXACT, causality)
    trials.add("isolation", "other documents changed, on the mesh", EXACT, isolation)
    trials.add("isolation", "packed and alone", "float64", lambda: laws.isolation_alone(subject, chunk))
    parts = trial_lengths(time)
    trials.add("continuation", "whole and in parts", "float64", lambda: laws.continuation(subject, chunk, parts))
    trials.add("continuation", "no state and an empty one", "float64", lambda: laws.empty_state(subject, chunk))
    trials.add("backend", "the config's and reference", "float64", lambda: laws.backend(subject, reference, chunk))


def training(config: Config, mesh: Mesh) -> Deviation:
    """The trainer's own loss, gradients and metrics, on the mesh against one device."""
    plan = blueprint(config)
    _, params = create(lambda: LanguageModel(config.model, nnx.Rngs(0)))
    differentiate = make_gradients(config, plan)

    def results(params: dict, batch: dict) -> dict[str, Any]:
        gradient, metrics, _ = differentiate(params, batch)
        return {"loss": metrics.pop("loss"), "gradient": gradient, "metrics": metrics}

    layout = {name: activation_sharding(axes, mesh, plan.rules) for name, axes in BATCH_AXES.items()}
    shardings = (parameter_shardings(plan.shapes, plan.declarations, mesh, plan.rules), layout)
    return laws.sharding_of(results, (spread(params), trial_batch(config, mesh.shape)), shardings, mesh, plan.rules)


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raises UserError for a config that cannot be trained on such a mesh, naming what does not divide."""
    plan = blueprint(config)
    check_batch(config, mesh, plan.rules)
    parameter_shardings(plan.shapes, plan.declarations, mesh, plan.rules)


def on_cpu(config: Config) -> tuple[Config, list[str]]:
    """The config with backend "auto" in the place of those that need an accelerator, and what that changed."""
    notes, mixers = [], {}
    for name, record in config.model.mixers.items():
        backend = record.get("backend", "auto")
        mixers[name] = dict(record)
        if BACKENDS.get(backend) is not None:
            mixers[name]["backend"] = "auto"
            notes.append(f"{name}: backend={backend} does not run on a CPU, so that auto was tried")
    return replace(config, model=replace(config.model, mixers=mixers)), notes


def with_backend(config: Config, backend: str) -> Config:
    """The config with this backend in all mixers that have a choice."""

    def record(record: Mapping[str, Any]) -> dict[str, Any]:
        has_one = "backend" in find_mixer(record["type"]).Options.__dataclass_fields__
        return dict(record) | ({"backend": backend} if has_one else {})

    used = mixer_names(config)
    mixers = {name: record(config.model.mixers[name]) for name in used}
    return replace(config, model=replace(config.model, mixers=mixers, remat={}))


def with_dtype(config: Config, dtype: str) -> Config:
    """The config with this dtype for all its numbers."""
    model = replace(config.model, param_dtype=dtype, compute_dtype=dtype, residual_dtype=dtype)
    return replace(config, model=model)


def mixer_names(config: Config) -> list[str]:
    """The mixers that the pattern names."""
    return sorted({name for names in parse_pattern(config.model.pattern, config.model.mixers) for name in names})


def mixers_of(config: Config) -> list[type[Mixer]]:
    """Their classes."""
    key = "model.mixers.{}.type"
    return [find_mixer(config.model.mixers[name]["type"], key.format(name)) for name in mixer_names(config)]


def config_hash(config: Config) -> str:
    """SHA-256 of the config without its mesh, as JSON with sorted keys."""
    values = {name: section for name, section in config.to_dict().items() if name != "mesh"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
