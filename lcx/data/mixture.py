"""Mixtures: which dataset a row comes from, and which row of it, in O(1).

Rows come in blocks of BLOCK. Each block holds every dataset's quota of rows exactly: after b blocks a dataset has given
b times its quota. Within a block the rows are spread by a digital net: any aligned stretch of 2**k rows, hence
nearly every batch, has each dataset's share to within a row or two.
"""

from collections.abc import Sequence

import numpy as np

from lcx.data.shuffle import make_key, permute

BITS = 16
BLOCK = 2**BITS
WINDOW = 64  # rows that change places, so that no place of a batch always reads the same dataset


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of each dataset in a block, int64: proportional to the weights, by largest remainders, at least 1 each.

    Args: weights, above 0, at most BLOCK of them.
    """
    return apportion(weights, BLOCK)


def apportion(weights: Sequence[float], count: int) -> np.ndarray:
    """`count` divided in proportion to weights above 0, by largest remainders, int64; at least 1 for each."""
    share = np.asarray(weights, np.float64) / np.sum(weights) * count
    whole = np.maximum(np.floor(share).astype(np.int64), 1)
    while (missing := count - int(whole.sum())) != 0:
        # Ties go to the first. What is taken back is taken where there is most beyond the share.
        best = np.argmax(share - whole) if missing > 0 else np.argmax(np.where(whole > 1, whole - share, -np.inf))
        whole[best] += np.sign(missing)
    return whole


def assign(rows: np.ndarray, quota: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The dataset of each row of a mixture, and the row's number in that dataset, int64 both.

    Rows 0, 1, ... of each dataset each come once. With one dataset nothing changes.
    """
    if len(quota) == 1:
        return np.zeros_like(rows), rows
    blocks, within = np.divmod(rows, BLOCK)
    windows, places = np.divmod(within, WINDOW)
    keys = np.uint64(make_key("mixture", seed)) ^ (rows // WINDOW).astype(np.uint64)
    places = windows * WINDOW + permute(places, WINDOW, keys)
    shifts = permute(blocks % BLOCK, BLOCK, make_key("mixture blocks", seed))
    points = _reverse_bits(places) ^ shifts
    borders = np.cumsum(quota)
    dataset = np.searchsorted(borders, points, side="right")
    return dataset, blocks * quota[dataset] + points - (borders - quota)[dataset]


def counts(rows: int, quota: np.ndarray, seed: int) -> np.ndarray:
    """How many of the first `rows` rows each dataset has given, int64."""
    blocks, rest = divmod(rows, BLOCK)
    dataset, _ = assign(blocks * BLOCK + np.arange(rest), quota, seed)
    return blocks * quota + np.bincount(dataset, minlength=len(quota))


def _reverse_bits(values: np.ndarray) -> np.ndarray:
    """The BITS bits of each value in the opposite order: the radical inverse of van der Corput's sequence."""
    out = np.zeros_like(values)
    for bit in range(BITS):
        out |= ((values >> bit) & 1) << (BITS - 1 - bit)
    return out
