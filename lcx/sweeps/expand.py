"""From a sweep to its trials: whole configs, each under a name that says what differs."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ml_collections import ConfigDict

from lcx.config import Config, assign, load_config
from lcx.errors import UserError
from lcx.sweeps.spec import Sweep

LONGEST_NAME = 160  # characters; a folder's name has at most 255 bytes
SEEDS = ("train.seed", "data.seed")  # trials that differ in these alone are repetitions
# (a config as dicts, what is counted: "parameters", or forward "flops" a token) -> the number, None if it is not known
Measure = Callable[[Mapping[str, Any], str], float | None]


@dataclass(frozen=True)
class Trial:
    """One run, or the point from which a search makes its runs."""

    name: str
    group: str  # the name without seeds
    family: str  # the name of its config in the sweep
    settings: Mapping[str, Any]  # what the trial has of its own, by field
    config: Mapping[str, Any]  # all fields, as dicts, lists and scalars
    size: float | None = None  # that it was matched to
    budget: float | None = None  # FLOPs
    chosen: Mapping[str, Any] = field(default_factory=dict)  # fields that were solved for, to match


def expand(sweep: Sweep, measure: Measure) -> list[Trial]:
    """The trials of a sweep in their order; of a search, the points that are searched from.

    measure: counts what is matched. Raises UserError for a field that does not exist, a value that it cannot have, a
    config that cannot be built, sizes that no widths give, and two trials of one name.
    """
    from lcx.sweeps.solve import matched  # loads NumPy, which a plain sweep does without

    trials = []
    for point in points(sweep):
        bases = {}
        for family, argument in sweep.configs.items():
            config = load_config(argument)
            for key, value in (dict(sweep.set) | point.fields).items():
                try:
                    assign(config, key, value)
                except UserError as error:
                    raise UserError(f"{point.place(key)} of the sweep, config {family}: {error}") from error
            bases[family] = Config.from_dict(config).to_dict()
        for shape in matched(sweep, bases, measure):
            for budget in sweep.budgets or (None,):
                trials.append(_trial(sweep, point, shape, budget, measure))
    _check_names(trials)
    if sweep.search:
        for trial in trials:  # a field that does not exist is found before anything runs
            with_values(trial, {key: space.example for key, space in sweep.search.space.items()}, 0)
    return trials


@dataclass(frozen=True)
class Point:
    """One combination of the grid with a record of the points."""

    fields: Mapping[str, Any]
    label: str | None  # that the record brings

    def place(self, key: str) -> str:
        """Where a field stands, for messages."""
        return f'"{key}"' if key in self.fields else f'set: "{key}"'


def points(sweep: Sweep) -> Iterator[Point]:
    """Every combination of the grid, within every record."""
    for record in sweep.points or ({},):
        label = record.get("name")
        fields = {key: value for key, value in record.items() if key != "name"}
        for values in itertools.product(*sweep.grid.values()):
            yield Point(fields | dict(zip(sweep.grid, values, strict=True)), label)


def _trial(sweep: Sweep, point: Point, shape: "Shape", budget: float | None, measure: Measure) -> Trial:
    config, chosen = shape.config, dict(shape.chosen)
    if budget is not None:
        train = config["train"]
        per_token = 3 * count(measure, config, "flops")  # forward, and twice as much backward
        steps = max(1, round(budget / (per_token * train["batch_size"] * train["sequence_length"])))
        config = config | {"train": train | {"steps": steps}}
        chosen["train.steps"] = steps
    named = [key for key in point.fields if point.label is None or key in sweep.grid]
    short = short_names([*(key for record in sweep.points for key in record if key != "name"), *sweep.grid])
    words = [shape.family]
    words += [f"{rounded(shape.size)}"] if sweep.sizes else []
    words += [f"{budget:g}FLOPs"] if budget is not None else []
    words += [point.label] if point.label is not None else []
    group = [*words, *(f"{short[key]}={text_of(point.fields[key])}" for key in named if key not in SEEDS)]
    seeds = [f"{short[key]}={text_of(point.fields[key])}" for key in named if key in SEEDS]
    return Trial(
        name=safe_name("-".join([*group, *seeds])),
        group=safe_name("-".join(group)),
        family=shape.family,
        settings=dict(point.fields),
        config=config,
        size=shape.size,
        budget=budget,
        chosen=chosen,
    )


@dataclass(frozen=True)
class Shape:
    """A config of one family, at one size where there are sizes."""

    family: str
    config: dict[str, Any]
    size: float | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)


def count(measure: Measure, config: Mapping[str, Any], what: str) -> float:
    """A number that has to be known; raises UserError where it is not."""
    found = measure(config, what)
    if found is None:
        raise UserError("a mixer of the model does not know its FLOPs, which the sweep needs: see Mixer.flops.")
    return found


def with_values(trial: Trial, values: Mapping[str, Any], number: int) -> Trial:
    """The trial of a search that a point and the chosen values make."""
    config = ConfigDict(json.loads(json.dumps(trial.config)), type_safe=False)
    for key, value in values.items():
        assign(config, key, value)
    short = short_names(list(values))
    words = [f"{short[key]}={text_of(rounded_value(value))}" for key, value in values.items()]
    return replace(
        trial,
        name=safe_name("-".join([trial.name, f"{number:03d}", *words])),
        group=safe_name("-".join([trial.name, f"{number:03d}", *words])),
        settings={**trial.settings, **values},
        config=Config.from_dict(config).to_dict(),
    )


def short_names(keys: list[str]) -> dict[str, str]:
    """The last word of each dotted key, or as many words as it takes to tell them apart."""
    keys = list(dict.fromkeys(keys))
    found = {}
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            found[key] = ".".join(words[-count:])
            if not any(other != key and f".{other}".endswith(f".{found[key]}") for other in keys):
                break
    return found


def text_of(value: Any) -> str:
    """A value as a word of a name."""
    if isinstance(value, list | tuple):
        return "+".join(map(text_of, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value) if not hasattr(value, "items") else json.dumps(dict(value))


def rounded(number: float) -> str:
    """A size as people write it: 421793280 is 421.8M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:g}"


def rounded_value(value: Any) -> Any:
    """A number that was drawn, to three digits."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def safe_name(text: str) -> str:
    """`text` as the name of a folder, the same on every system."""
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).lstrip(".-") or "_"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check_names(trials: list[Trial]) -> None:
    seen: dict[str, Trial] = {}
    for trial in trials:
        if trial.name.lower() in seen:  # some file systems know no case
            raise UserError(
                f'two trials of the sweep are called "{trial.name}": leave out the value that stands twice, '
                'or give the points a "name" each.'
            )
        seen[trial.name.lower()] = trial
