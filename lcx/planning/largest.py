"""The largest batch and the longest sequence that fit."""

from collections.abc import Callable, Mapping
from typing import Any

from lcx.planning.plan import Plan

FIELDS = ("batch_size", "sequence_length")
PROPORTION = "in proportion to the tokens, from one compiled program; compile it (--largest) before you rely on it"
NOT_FROM_HERE = "what was compiled does not fit: --largest compiles smaller ones"
COMPILED = "a line through two compiled programs, and the result compiled"
MOST_COMPILED = 4  # besides the plan itself


def in_proportion(plan: Plan, unit: Mapping[str, int]) -> dict[str, Any]:
    """Batch size and sequence length that fit, as {"batch_size", "sequence_length", "method"}; null where unknown.

    Parameters and optimizer stay, all else grows with the tokens. A part of it does not (gradients, gathered weights),
    so a larger batch takes somewhat less than this, and nothing is said where the plan itself does not fit.
    """
    if not plan.fits:
        return dict.fromkeys(FIELDS) | {"method": NOT_FROM_HERE}
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
    """The largest value of one field that was compiled and fits; None where nothing did."""
    points = {getattr(plan.config.train, name): plan}
    for _ in range(MOST_COMPILED):
        value = _next(points, unit, plan.hardware.memory)
        if value is None:
            break
        points[value] = compiled(**{name: value})
    return max((value for value, plan in points.items() if plan.fits), default=None)


def _next(points: Mapping[int, Plan], unit: int, memory: float) -> int | None:
    """What to compile next, between what fits and what does not: where the line through the two programs that are
    nearest to the device's memory meets it. None where that is no more than what fits already."""
    low = max((value for value, plan in points.items() if plan.fits), default=0)
    high = min((value for value, plan in points.items() if not plan.fits), default=None)
    if len(points) == 1:
        guess = 2 * low if low else max(_down(high / 2, unit), unit)
    else:
        near = sorted(points, key=lambda value: abs(points[value].memory.total - memory))[:2]
        (x0, y0), (x1, y1) = ((value, points[value].memory.total) for value in near)
        slope = (y1 - y0) / (x1 - x0)
        guess = _down(x0 + (memory - y0) / slope, unit) if slope > 0 else low
    if high is not None:
        guess = min(guess, _down(high - 1, unit))
        if low and sum(not plan.fits for plan in points.values()) > 1:  # the line was wrong: no further than halfway
            guess = min(guess, _down((low + high) / 2, unit))
    if not low:
        guess = max(guess, unit)
    return guess if guess > low and guess not in points else None


def _down(value: float, unit: int) -> int:
    return int(value // unit) * unit
