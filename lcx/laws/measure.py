"""How far two sets of arrays are apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lcx.params import path_name

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # what a law that rounding may touch allows


@dataclass(frozen=True)
class Deviation:
    """The largest difference, and the array it was found in."""

    value: float
    where: str
    each: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)  # of every array, in order

    def __str__(self) -> str:
        return f"{self.value:.2e} in {self.where}"

    def first_above(self, allowed: float) -> str | None:
        """The first array that differs by more; None where none does."""
        return next((name for name, value in self.each.items() if not value <= allowed), None)


def largest(each: Mapping[str, float]) -> Deviation:
    """The deviation of arrays that differ that much, by name."""
    where = max(each, key=lambda name: each[name], default=None)
    return Deviation(each[where], where, each) if where and each[where] else Deviation(0.0, "nothing", each)


def together(deviations: Mapping[str, Deviation]) -> Deviation:
    """Several deviations as one; their names stand before those of their arrays."""
    return largest({f"{name}/{array}": value for name, one in deviations.items() for array, value in one.each.items()})


def deviation(found: Any, expected: Any) -> Deviation:
    """max over arrays of ||g - g0|| / max(||g0||, 1e-6 ||all g0||), g0 being `expected`; NaN counts as infinite.

    The norms are taken over each array of the two trees, and "all" over the arrays of one entry of the outermost dict
    (outputs, gradients of parameters, ...), since those have scales of their own.
    """
    each = {}
    for group in expected:
        pairs = jax.tree_util.tree_leaves_with_path(expected[group])
        others = jax.tree.leaves(found[group])
        floor = 1e-6 * np.sqrt(sum(_norm(leaf) ** 2 for _, leaf in pairs))
        for (path, leaf), other in zip(pairs, others, strict=True):
            difference = _norm(np.asarray(other, np.float64) - np.asarray(leaf, np.float64))
            value = difference / max(_norm(leaf), floor, np.finfo(np.float64).tiny)
            each["/".join(filter(None, (group, path_name(path))))] = float(np.nan_to_num(value, nan=np.inf))
    return largest(each)


def changed(found: Any, expected: Any) -> Deviation:
    """The largest absolute difference, for laws that demand equality to the last bit."""
    each = {}
    pairs = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), other in zip(pairs, jax.tree.leaves(found), strict=True):
        leaf, other = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        value = float(np.abs(other - leaf).max(initial=0.0))
        each[path_name(path)] = float(np.nan_to_num(value, nan=np.inf))
    return largest(each)


def _norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))
