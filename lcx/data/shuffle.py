"""Shuffles that are addressed by index: a keyed bijection of range(n), and the order of documents in an epoch."""

import hashlib
import math

import numpy as np

ROUNDS = 8


def make_key(purpose: str, *numbers: int) -> int:
    """A 64-bit key from what a shuffle is for and what it depends on (seed, epoch); the same on every machine."""
    text = " ".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, n: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Where a keyed random permutation of range(n) puts each index, in O(1) an index and without a table.

    A Feistel network over pairs (left, right) in range(a) x range(b) with a * b just above n; what lands at or above n
    goes through again until it is inside ("cycle walking"), which keeps it a bijection: Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains" (2002), method 3.

    Args: index, integers in range(n); n from 1 to 2**62; key 64 bits. They broadcast. Returns int64.
    """
    index, n, key = (np.asarray(argument, np.uint64) for argument in (index, n, key))
    index = np.broadcast_to(index, np.broadcast_shapes(index.shape, n.shape, key.shape))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        out = _encrypt(index, a, b, key)
        while (outside := out >= n).any():
            out = np.where(outside, _encrypt(out, a, b, key), out)
    return out.reshape(index.shape).astype(np.int64)


def _encrypt(value: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A bijection of range(a * b), all uint64: left and right take turns to be shifted by a hash of the other."""
    left, right = value // b, _modulo(value, b)
    for round_number in range(0, ROUNDS, 2):
        left = _modulo(left + _modulo(_mix(_mix(key + np.uint64(round_number)) ^ right), a), a)
        right = _modulo(right + _modulo(_mix(_mix(key + np.uint64(round_number + 1)) ^ left), b), b)
    return left * b + right


def _modulo(value: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """value % divisor: NumPy divides by one number with vector instructions, but has none for the remainder."""
    quotient = value // divisor
    quotient *= divisor
    return value - quotient


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's step, a bijection of 64 bits with good avalanche: Steele, Lea and Flood (2014)."""
    value = np.atleast_1d(value + np.uint64(0x9E3779B97F4A7C15))  # from here on in place, which is a third quicker
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def block_length(n: int) -> int:
    """Documents in a block of a collection of n, but for the last: the square root, rounded up."""
    return math.isqrt(n - 1) + 1


def block_order(n: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of an epoch in the order in which they are read, and the documents in each, int64 [blocks]."""
    length = block_length(n)
    blocks = -(-n // length)
    order = permute(np.arange(blocks), blocks, make_key("blocks", seed, epoch))
    return order, np.minimum(length, n - order * length)


def order_within(blocks: np.ndarray, sizes: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The documents of these blocks, which have these sizes, in the order in which they are read.

    Sorted by a keyed hash, which is several times quicker than `permute` where the order of all is wanted. No two
    documents of a block have the same hash.
    """
    block = np.repeat(blocks, sizes).astype(np.uint64)
    within = np.arange(len(block)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    hashes = _mix(_mix(np.uint64(make_key("documents", seed, epoch)) ^ block) ^ within.astype(np.uint64))
    order = np.argsort(hashes) if len(blocks) == 1 else np.lexsort((hashes, np.repeat(np.arange(len(blocks)), sizes)))
    return block[order].astype(np.int64) * block_length(n) + within[order]


def document_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The documents of an epoch in the order in which they are read, int64 [n]: blocks shuffled, then within blocks.

    Two levels keep neighbours of the storage near each other in the stream, so that a reader touches about sqrt(n)
    places at a time and a table over blocks suffices to find a document.
    """
    blocks, sizes = block_order(n, seed, epoch)
    return order_within(blocks, sizes, n, seed, epoch)
