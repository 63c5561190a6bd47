"""Backend: outputs and gradients are the same for every kernel backend."""

from dataclasses import asdict, replace

from lcx.laws.chunk import Chunk
from lcx.laws.measure import Deviation, deviation
from lcx.laws.subject import Subject


def backend(subject: Subject, reference: Subject, chunk: Chunk) -> Deviation:
    """A chunk against the same chunk, with the same parameters, on the subject made with other backends.

    Compares outputs, the final state and the gradients of inputs, parameters and the state at the start.
    """
    arguments = chunk.x, chunk.state, chunk.context, chunk.dy, chunk.dstate
    found, expected = subject.pull(*arguments), replace(reference, params=subject.params).pull(*arguments)
    return deviation(asdict(found), asdict(expected))
