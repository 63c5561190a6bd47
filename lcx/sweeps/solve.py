"""Equal architectures: widths and depths at which configs have the same parameters, FLOPs a token, or tokens.

Of a stack of `periods` equal periods whose inner widths d_ff grow together, both counts are exactly

    embedding(d_model) + periods * (period(d_model) + slope(d_model) * added d_ff)

so four measurements at each d_model give every depth and every d_ff. Widths are multiples of 8 at least, so that heads,
groups and meshes of up to eight devices divide; the number of heads and groups stays what it was.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lcx.errors import UserError
from lcx.sweeps.expand import Measure, Shape, count, rounded
from lcx.sweeps.spec import Sweep

QUANTA = (128, 64, 32, 16, 8)  # of widths; the largest at which d_model has this many steps from one to its double
STEPS_PER_DOUBLING = 12
SPREAD = 0.005  # from the common value, so that any two are within 1%
DRIFT = 0.05  # how far the common value may lie from the size that was asked for
LONGEST_FF, SHORTEST_FF = 1.35, 0.75  # d_ff over what the width alone would make it
WIDTHS = ((0.8, 1.3), (0.5, 1.7))  # that are tried, over the one that is needed: with a d_ff to close gaps, without
INNER = "d_ff"  # the options that close what widths and depths leave open
WHAT = {"parameters": "parameters", "flops": "FLOPs a token", "tokens": "tokens"}


def matched(sweep: Sweep, bases: Mapping[str, Mapping[str, Any]], measure: Measure) -> Iterator[Shape]:
    """Each config at each size; as it is, where nothing is to be matched.

    Args:
      sweep: match, sizes, vary.
      bases: the configs by name, as dicts.
      measure: counts "parameters" or "flops" of a config.

    Raises UserError where no widths and depths give a size.
    """
    if sweep.match is None:
        yield from (Shape(family, config) for family, config in bases.items())
    elif sweep.match == "tokens":
        yield from _equal_tokens(sweep, bases)
    elif sweep.sizes:
        families = {name: Family(base, sweep.match, sweep.vary, measure) for name, base in bases.items()}
        for size in sweep.sizes:
            for family, solution in _common(families, size).items():
                yield families[family].shape(family, solution, size)
    else:
        first, *others = bases
        size = count(measure, bases[first], sweep.match)
        yield Shape(first, dict(bases[first]), size)
        for name in others:
            family = Family(bases[name], sweep.match, sweep.vary, measure)
            solution = family.solve(size, SPREAD) or family.solve(size, 2 * SPREAD)
            if solution is None:
                raise UserError(_too_far(name, size, family) + " Give `sizes`: then all configs move.")
            yield family.shape(name, solution, size)


def _equal_tokens(sweep: Sweep, bases: Mapping[str, Mapping[str, Any]]) -> Iterator[Shape]:
    per_step = {name: base["train"]["batch_size"] * base["train"]["sequence_length"] for name, base in bases.items()}
    first = next(iter(bases))
    for size in sweep.sizes or (per_step[first] * bases[first]["train"]["steps"],):
        for name, base in bases.items():
            steps = max(1, round(size / per_step[name]))
            if abs(steps * per_step[name] / size - 1) > 2 * SPREAD:
                raise UserError(
                    f"{name}: no number of steps of {per_step[name]} tokens is within 1% of {rounded(size)} tokens; "
                    "make train.batch_size or train.sequence_length smaller."
                )
            config = dict(base) | {"train": base["train"] | {"steps": steps}}
            yield Shape(name, config, size, {"train.steps": steps})


def _common(families: "Mapping[str, Family]", size: float) -> "dict[str, Solution]":
    """A solution of each family, all within SPREAD of one value near `size`, which bends no shape more than it must."""
    stiffest = min(families.values(), key=lambda family: len(family.solutions(size)))
    best, least = None, math.inf
    for value in {size, *(found.value for found in stiffest.solutions(size))}:
        found = {name: family.solve(value, SPREAD) for name, family in families.items()}
        if not all(found.values()):
            continue
        distortion = max(solution.distortion for solution in found.values()) + abs(math.log(value / size))
        if distortion < least:
            best, least = found, distortion
    if best:
        return best
    for name, family in families.items():
        if family.solve(size, DRIFT) is None:
            raise UserError(_too_far(name, size, family))
    raise UserError(
        f"no widths and depths make {', '.join(families)} equal within 1% near {rounded(size)} "
        f"{WHAT[next(iter(families.values())).quantity]}; choose a larger size, or vary other than the width."
    )


def _too_far(name: str, size: float, family: "Family") -> str:
    nearest = min((found.value for found in family.solutions(size)), key=lambda v: abs(v - size), default=None)
    hint = f"the nearest is {rounded(nearest)}" if nearest else "no width comes near"
    return f"{name} cannot have {rounded(size)} {WHAT[family.quantity]}: {hint}."


@dataclass(frozen=True)
class Solution:
    """A shape, what it measures, and how far it is from the base's shape."""

    value: float
    distortion: float
    d_model: int
    periods: int
    added: int  # to every d_ff


@dataclass(frozen=True)
class Line:
    """The count of every depth and d_ff at one width."""

    fixed: float
    period: float
    slope: float  # of a period, by the number added to every d_ff
    inner: int  # the smallest d_ff, before anything is added; 0 where there is none


class Family:
    """A config, and the shapes that it can take."""

    def __init__(self, base: Mapping[str, Any], quantity: str, vary: str, measure: Measure):
        self.base, self.quantity, self.vary, self._measure = base, quantity, vary, partial(count, measure)
        self.base_has_inner = any(INNER in record for record in base["model"]["mixers"].values())
        self._lines: dict[int, Line | None] = {}
        self._solutions: dict[float, list[Solution]] = {}

    def solve(self, value: float, spread: float) -> Solution | None:
        """The shape nearest to the base's of those within `spread` of the value, by ratio; None where there is none."""
        close = [found for found in self.solutions(value) if abs(found.value / value - 1) <= spread]
        return min(close, key=lambda found: (found.distortion, abs(found.value - value)), default=None)

    def solutions(self, value: float) -> list[Solution]:
        """For every width and depth near what is needed, the d_ff that comes nearest to the value."""
        if value not in self._solutions:
            quantum = self._quantum(value)
            self._solutions[value] = [
                solution
                for d_model in self._widths(value, quantum)
                if (line := self._line(d_model)) is not None
                for periods in self._depths(line, value)
                if (solution := self._solution(d_model, periods, line, value, quantum)) is not None
            ]
        return self._solutions[value]

    def shape(self, name: str, solution: Solution, size: float) -> Shape:
        """The config of a solution; `chosen` says what is not the base's, and what came of it."""
        config = self._config(solution.d_model, solution.periods, solution.added)
        found = self._measure(config, self.quantity)
        if not math.isclose(found, solution.value, rel_tol=1e-9):
            raise UserError(
                f"{name}: {self.quantity} do not grow evenly with depth and d_ff, so they cannot be matched."
            )
        model, base = config["model"], self.base["model"]
        chosen = {f"model.{key}": model[key] for key in ("d_model", "periods") if model[key] != base[key]}
        for mixer, record in model["mixers"].items():
            for option in PROPORTIONAL:
                if record.get(option) != base["mixers"][mixer].get(option):
                    chosen[f"model.mixers.{mixer}.{option}"] = record[option]
        return Shape(name, config, size, chosen)

    def _solution(self, d_model: int, periods: int, line: Line, value: float, quantum: int) -> Solution | None:
        added = 0
        if line.slope:
            needed = (value - line.fixed) / periods - line.period
            step = min(quantum, 64)
            added = step * round(needed / line.slope / step)
            least, most = (step * round(line.inner * (share - 1) / step) for share in (SHORTEST_FF, LONGEST_FF))
            added = min(max(added, least), most)
        found = line.fixed + periods * (line.period + line.slope * added)
        if abs(found / value - 1) > DRIFT:
            return None
        wider = abs(math.log(d_model / self.base["model"]["d_model"]))
        deeper = abs(math.log(periods / self.base["model"]["periods"]))
        aspect = abs(math.log(d_model / self.base["model"]["d_model"] * self.base["model"]["periods"] / periods))
        distortion = {"width": deeper, "depth": wider, "both": aspect}[self.vary]
        inner = abs(math.log(1 + added / line.inner)) if added else 0.0
        uneven = math.log2(QUANTA[0] / math.gcd(d_model, QUANTA[0]))
        return Solution(found, distortion + inner / 4 + uneven / 100, d_model, periods, added)

    def _line(self, d_model: int) -> Line | None:
        """None where the config cannot have this width."""
        if d_model not in self._lines:
            try:
                one, two = (self._measure(self._config(d_model, periods, 0), self.quantity) for periods in (1, 2))
                inner = [
                    record[INNER]
                    for record in self._config(d_model, 1, 0)["model"]["mixers"].values()
                    if INNER in record
                ]
                slope = 0.0
                if inner:
                    more = [self._measure(self._config(d_model, periods, 8), self.quantity) for periods in (1, 2)]
                    slope = ((more[1] - more[0]) - (two - one)) / 8
                self._lines[d_model] = Line(2 * one - two, two - one, slope, min(inner, default=0))
            except UserError:
                self._lines[d_model] = None
        return self._lines[d_model]

    def _quantum(self, value: float) -> int:
        width = self._width_at(value)
        return next((quantum for quantum in QUANTA if width >= quantum * STEPS_PER_DOUBLING), QUANTA[-1])

    def _width_at(self, value: float) -> float:
        """Roughly the width at which the base's depth has this count: it grows with the square."""
        base = self._measure(self.base, self.quantity)
        width = self.base["model"]["d_model"]
        return width if self.vary == "depth" else width * (value / base) ** (1 / 3 if self.vary == "both" else 1 / 2)

    def _widths(self, value: float, quantum: int) -> list[int]:
        middle = self._width_at(value)
        base = self.base["model"]["d_model"]
        if self.vary == "depth":
            middle = base
        least, most = WIDTHS[0 if self.base_has_inner else 1]
        low, high = least * middle, most * middle
        first, last = max(1, math.floor(low / quantum)), math.ceil(high / quantum)
        widths = {quantum * step for step in range(first, last + 1)}
        return sorted(widths | ({base} if self.vary == "depth" else set()))

    def _depths(self, line: Line, value: float) -> list[int]:
        """The whole numbers beside the depth that gives the value with the d_ff that belong to the width."""
        depth = (value - line.fixed) / line.period
        room = (LONGEST_FF if line.slope else 1.0, SHORTEST_FF if line.slope else 1.0)
        share = line.slope * line.inner / line.period  # of a period's count that d_ff is
        low, high = (depth / (1 + (factor - 1) * share) for factor in room)
        return [periods for periods in range(math.floor(low), math.ceil(high) + 1) if periods >= 1]

    def _config(self, d_model: int, periods: int, added: int) -> dict[str, Any]:
        config = at_width(self.base, d_model)
        for record in config["model"]["mixers"].values():
            if INNER in record:
                record[INNER] += added
        config["model"]["periods"] = periods
        return config


def at_width(base: Mapping[str, Any], d_model: int) -> dict[str, Any]:
    """A config at another width: what is proportional to the width grows with it, the rest stays."""
    config = copy.deepcopy(dict(base))
    model = config["model"]
    factor = d_model / model["d_model"]
    for record in model["mixers"].values():
        for option, grow in PROPORTIONAL.items():
            if isinstance(record.get(option), int):
                record[option] = grow(record, d_model, factor)
    model["d_model"] = d_model
    return config


def _inner_width(record: Mapping[str, Any], d_model: int, factor: float) -> int:
    """To the nearest multiple of 8."""
    return max(8, 8 * round(record[INNER] * factor / 8))


def _head_width(record: Mapping[str, Any], d_model: int, factor: float) -> int:
    """As it was where heads of it still divide over eight devices; else as many heads, of an even width."""
    if record.get("num_heads") is None and record.get("expand", 2) * d_model % (8 * record["head_dim"]) == 0:
        return record["head_dim"]
    return max(2, 2 * round(record["head_dim"] * factor / 2))


PROPORTIONAL = {INNER: _inner_width, "head_dim": _head_width}  # options that grow with d_model
