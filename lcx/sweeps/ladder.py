"""Iso-FLOP ladders: the best size for each budget, and how both grow together.

Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2): for each budget of FLOPs a parabola through the losses over the
logarithm of the parameters; its minimum is the best size, and best sizes over budgets follow a power law.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def ladder(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ladder of each family: its parabolas by budget and the power laws through their minima.

    records: trials as of report.json, with family, budget, parameters and metric.
    """
    families = dict.fromkeys(record["family"] for record in records)
    return [_of_family(family, [r for r in records if r["family"] == family]) for family in families]


def _of_family(family: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rungs = []
    for budget in sorted({record["budget"] for record in records}):
        points = sorted(
            (record["parameters"], record["metric"])
            for record in records
            if record["budget"] == budget and record["metric"] is not None
        )
        rungs.append({"budget": budget, "points": [list(point) for point in points], **parabola(points)})
    best = [(rung["budget"], rung["parameters"], rung["loss"]) for rung in rungs if rung["minimum"]]
    budgets, parameters, losses = zip(*best, strict=True) if best else ((), (), ())
    return {
        "family": family,
        "rungs": rungs,
        "parameters": power_law(budgets, parameters),
        "loss": power_law(budgets, losses),
    }


def parabola(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The parabola of least squares through (parameters, loss), over ln(parameters).

    Returns coefficients (of ln(parameters), the square first; None of fewer than three sizes), and `parameters` and
    `loss` at its lowest point. `minimum` is whether it is one that the sizes enclose: only then it says anything.
    """
    x, y = np.log([point[0] for point in points]), np.array([point[1] for point in points])
    if len(set(np.round(x, 6))) < 3:
        return {"coefficients": None, "minimum": False, "parameters": None, "loss": None}
    centre = float(x.mean())
    a, b, c = np.polyfit(x - centre, y, 2)
    coefficients = [float(a), float(b - 2 * a * centre), float(c - b * centre + a * centre**2)]
    if a <= 0:
        return {"coefficients": coefficients, "minimum": False, "parameters": None, "loss": None}
    lowest = centre - b / (2 * a)
    return {
        "coefficients": coefficients,
        "minimum": bool(x.min() <= lowest <= x.max()),
        "parameters": math.exp(lowest),
        "loss": float(c - b * b / (4 * a)),
    }


def power_law(budgets: Sequence[float], values: Sequence[float]) -> dict[str, float] | None:
    """`value = scale * budget ** exponent` by least squares of the logarithms; None of fewer than two budgets."""
    if len(set(budgets)) < 2 or min(values) <= 0:
        return None
    exponent, offset = np.polyfit(np.log(budgets), np.log(values), 1)
    return {"scale": float(math.exp(offset)), "exponent": float(exponent)}
