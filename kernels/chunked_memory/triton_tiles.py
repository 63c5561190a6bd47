"""What the Triton kernels of the chunked memory share: documents within a chunk, tiles, what a NaN reaches."""

import triton
import triton.language as tl

# exp of it is 0; what is below it, -inf too, is taken for it: inf - inf would be no number.
LOWEST = tl.constexpr(-1.0e4)


@triton.jit
def is_finite(tile):
    return tl.abs(tile) < float("inf")


@triton.jit
def bad_rows(finite):
    """Which rows are not finite throughout, [C]."""
    return tl.max(tl.where(finite, 0, 1), axis=1) > 0


@triton.jit
def nan_from(bad, tile):
    """The tile with NaN in all rows from the first marked one on."""
    return tl.where((tl.cumsum(bad.to(tl.int32), 0) > 0)[:, None], float("nan"), tile)


@triton.jit
def documents(reset, token, exists, HAS_RESET: tl.constexpr):
    """The number of each token's document, counted from the one that the chunk goes on with, [C]; the first, the last.

    Args: token, its number in the whole array.
    """
    if HAS_RESET:
        marks = tl.load(reset + token, mask=exists, other=0).to(tl.int32)
        document = tl.cumsum(marks, 0)
        return document, tl.min(document), tl.max(document)
    else:
        return tl.zeros_like(exists.to(tl.int32)), 0, 0


@triton.jit
def load_tile(array, rows, columns, mask, dtype: tl.constexpr):
    """[rows, columns] where ``mask``, else 0."""
    return tl.load(array + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(dtype)
