"""The laws of mixers, as functions that measure how far a mixer is from obeying them.

Each law takes a `Subject` (a mixer, or the stack of a model), a `Chunk` of input and cotangents, and returns a
`Deviation`. `TOLERANCE` says what is allowed in each dtype; causality and the first form of isolation allow nothing.
"""

from lcx.laws.backend import backend
from lcx.laws.causality import causality
from lcx.laws.chunk import Chunk, Document, from_nothing, pack
from lcx.laws.continuation import continuation, empty_state
from lcx.laws.exceptions import LAWS, declared_exceptions
from lcx.laws.isolation import isolation_alone, isolation_bitwise
from lcx.laws.measure import TOLERANCE, Deviation
from lcx.laws.sharding import sharding, sharding_of
from lcx.laws.subject import Subject, mixer_subject, stack_subject

__all__ = [
    "LAWS",
    "TOLERANCE",
    "Chunk",
    "Deviation",
    "Document",
    "Subject",
    "backend",
    "causality",
    "continuation",
    "declared_exceptions",
    "empty_state",
    "from_nothing",
    "isolation_alone",
    "isolation_bitwise",
    "mixer_subject",
    "pack",
    "sharding",
    "sharding_of",
    "stack_subject",
]
