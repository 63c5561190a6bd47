"""What a sweep file says, checked: `get_sweep(arg="")` returns a dict of the fields of `Sweep`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lcx.config import call_config_file
from lcx.errors import UserError
from lcx.schema import build, limited


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a search looks for the value of a field: between low and high, or among choices."""

    low: float | None = None
    high: float | None = None
    log: bool = False  # even in the logarithm
    integer: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self):
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise UserError("search.space: a field has either choices, or low and high.")
        if not self.choices and (self.low is None or self.high is None or not self.low < self.high):
            raise UserError(f"search.space: low must be below high, not {self.low} and {self.high}.")
        if self.log and self.low <= 0:
            raise UserError(f"search.space: a range that is even in the logarithm begins above 0, not at {self.low:g}.")

    @property
    def example(self) -> Any:
        """One of the values."""
        if self.choices:
            return self.choices[0]
        return int(self.high) if self.integer else self.high


@dataclass(frozen=True, kw_only=True)
class Search:
    """Trials whose values optuna chooses by the results of those before; so many for each point of the sweep."""

    space: Mapping[str, Range]  # by the field of the config
    trials: int = limited(20, minimum=1)
    sampler: Literal["tpe", "random", "gp"] = "tpe"
    seed: int = limited(0, minimum=0)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is tried: every config, at every size, for every budget, with every record of `points` and of the grid."""

    configs: Mapping[str, str]  # a name for each, and what --config would take: "configs/samba.py:size=tiny"
    set: Mapping[str, Any] = field(default_factory=dict)  # fields of every trial
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # field: values; every combination is tried
    points: tuple[Mapping[str, Any], ...] = ()  # records of fields, each tried; "name" is what a record is called
    search: Search | None = None

    # Equal architectures: of parameters, of forward FLOPs per token at the trial's sequence_length, or of trained
    # tokens (by train.steps). `sizes` are the common values; without them the first config's own.
    match: Literal["parameters", "flops", "tokens"] | None = None
    sizes: tuple[float, ...] = limited((), above=0)
    vary: Literal["width", "depth", "both"] = "width"  # what is solved for; the other changes only where it must
    budgets: tuple[float, ...] = limited((), above=0)  # FLOPs of a whole training, each tried, by train.steps

    metric: str = "heldout.loss"  # what is compared: evaluation/FILE.json and a number in it
    goal: Literal["minimize", "maximize"] = "minimize"
    retries: int = limited(1, minimum=0)  # of a trial that fails
    slurm: Mapping[str, Any] = field(default_factory=dict)  # of submitit: timeout_min, partition, gpus_per_node, ...

    def __post_init__(self):
        if not self.configs:
            raise UserError("configs of the sweep is empty: name at least one, like {'samba': 'configs/samba.py'}.")
        if self.sizes and not self.match:
            raise UserError(
                'sizes are given, but not what they are of: set match to "parameters", "flops" or "tokens".'
            )
        if self.budgets and self.match == "tokens":
            raise UserError('budgets and match="tokens" both decide train.steps: leave one out.')
        for key, values in self.grid.items():
            if not values:
                raise UserError(f'grid: "{key}" has no values.')
        if self.search and not self.search.space:
            raise UserError("search.space is empty: name a field to search over.")
        places = {"set": self.set, "grid": self.grid, "search.space": self.search.space if self.search else {}}
        places |= {f"points[{index}]": point for index, point in enumerate(self.points)}
        seen: dict[str, str] = {}
        for place, fields in places.items():
            for key in fields:
                other = seen.setdefault(key, place)
                if other != place and not (other.startswith("points[") and place.startswith("points[")):
                    raise UserError(f'"{key}" is in both {other} and {place} of the sweep: leave one out.')
        if (self.budgets or self.match == "tokens") and "train.steps" in seen:
            why = "budgets" if self.budgets else 'match="tokens"'
            raise UserError(f"train.steps is in {seen['train.steps']} of the sweep, but {why} decides it.")


def load_sweep(argument: str | os.PathLike) -> Sweep:
    """The sweep of a file: "configs/sweeps/families.py:steps=20" runs its `get_sweep("steps=20")`.

    Raises UserError for whatever is wrong in the file, naming the field.
    """
    return build(Sweep, call_config_file(argument, "get_sweep"))
