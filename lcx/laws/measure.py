"""How far two sets of arrays are apart."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lcx.params import path_name

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # what a law that rounding may touch allows


@dataclass(frozen=True)
class Deviation:
    """The largest relative difference, and the array it was found in."""

    value: float
    where: str

    def __str__(self) -> str:
        return f"{self.value:.2e} in {self.where}"


def deviation(found: Any, expected: Any) -> Deviation:
    """max over arrays of ||g - g0|| / max(||g0||, 1e-6 ||all g0||), g0 being `expected`; NaN counts as infinite.

    The norms are taken over each array of the two trees, and "all" over the arrays of one entry of the outermost dict
    (outputs, gradients of parameters, ...), since those have scales of their own.
    """
    worst = Deviation(0.0, "nothing")
    for group in expected:
        pairs = jax.tree_util.tree_leaves_with_path(expected[group])
        others = jax.tree.leaves(found[group])
        floor = 1e-6 * np.sqrt(sum(_norm(leaf) ** 2 for _, leaf in pairs))
        for (path, leaf), other in zip(pairs, others, strict=True):
            difference = _norm(np.asarray(other, np.float64) - np.asarray(leaf, np.float64))
            value = difference / max(_norm(leaf), floor, np.finfo(np.float64).tiny)
            if not value <= worst.value:
                worst = Deviation(float(np.nan_to_num(value, nan=np.inf)), "/".join((group, path_name(path))))
    return worst


def changed(found: Any, expected: Any) -> Deviation:
    """The largest absolute difference, for laws that demand equality to the last bit."""
    worst = Deviation(0.0, "nothing")
    pairs = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), other in zip(pairs, jax.tree.leaves(found), strict=True):
        leaf, other = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        value = float(np.abs(other - leaf).max(initial=0.0))
        if not value <= worst.value:
            worst = Deviation(float(np.nan_to_num(value, nan=np.inf)), path_name(path))
    return worst


def _norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))
