"""The largest batch and the longest sequence that fit."""

from collections.abc import Callable, Mapping
from typing import Any

from lcx.planning.plan import Plan

FIELDS = ("batch_size", "sequence_length")
PROPORTION = "in proportion to the tokens, from one compiled program; compile it (--largest) before you rely on it"
COMPILED = "a line through two compiled programs, and the result compiled"
MOST_TRIES = 4  # compilations after the line is drawn


def in_proportion(plan: Plan, unit: Mapping[str, int]) -> dict[str, Any]:
    """Batch size and sequence length that fit, as {"batch_size", "sequence_length", "method"}; null where unknown.

    Parameters and optimizer stay, all else grows with the tokens. A part of it does not (gradients, gathered weights),
    so a larger batch takes somewhat less than this, and nothing is said where the plan itself does not fit.
    """
    if not plan.fits:
        return dict.fromkeys(FIELDS) | {"method": "unknown: what was compiled does not fit"}
    growing = plan.memory.total - plan.memory.state
    factor = (plan.hardware.memory - plan.memory.state) / max(growing, 1)
    largest = {name: _down(factor * getattr(plan.config.train, name), unit[name]) for name in FIELDS}
    return largest | {"method": PROPORTION}


def by_compiling(plan: Plan, unit: Mapping[str, int], compiled: Callable[..., Plan]) -> dict[str, Any]:
    """The same, found by compiling.

    Args:
      plan: of the config.
      unit: what each field is a multiple of.
      compiled: the plan of another batch_size or sequence_length.
    """
    return {name: _largest(plan, name, unit[name], compiled) for name in FIELDS} | {"method": COMPILED}


def _largest(plan: Plan, name: str, unit: int, compiled: Callable[..., Plan]) -> int | None:
    """The largest value of one field that was compiled and fits; None where not even one unit does."""
    value = getattr(plan.config.train, name)
    points = {value: plan}
    other = 2 * value if plan.fits else max(_down(value / 2, unit), unit)
    for _ in range(MOST_TRIES):
        if other not in points:
            points[other] = compiled(**{name: other})
        other = _next(points, unit)
        if other is None:
            break
    return max((value for value, plan in points.items() if plan.fits), default=None)


def _next(points: Mapping[int, Plan], unit: int) -> int | None:
    """What to compile next: where the line through the two largest programs meets the memory, between what fits and
    what does not."""
    fitting = [value for value, plan in points.items() if plan.fits]
    failing = [value for value, plan in points.items() if not plan.fits]
    (x0, y0), (x1, y1) = sorted((value, plan.memory.total) for value, plan in points.items())[-2:]
    slope = (y1 - y0) / (x1 - x0)
    memory = next(iter(points.values())).hardware.memory
    guess = _down(x0 + (memory - y0) / slope, unit) if slope > 0 else 2 * x1
    low, high = max(fitting, default=0), min(failing, default=None)
    guess = max(guess, low)
    if high is not None:
        guess = min(guess, high - unit)
    return guess if guess > low else None


def _down(value: float, unit: int) -> int:
    return int(value // unit) * unit
