"""Sharding: outputs, loss and gradients are the same under every mesh."""

from collections.abc import Callable
from dataclasses import asdict

import jax
from jax.sharding import Mesh

from lcx.laws.chunk import Chunk
from lcx.laws.measure import Deviation, deviation
from lcx.laws.subject import Subject
from lcx.parallel.sharding import DEFAULT_RULES, Rules, on_mesh


def sharding(subject: Subject, chunk: Chunk, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Deviation:
    """A chunk on the mesh against the same chunk on one device.

    Compares outputs, the final state and the gradients of inputs, parameters and the state at the start.
    """
    arguments = chunk.x, chunk.state, chunk.context, chunk.dy, chunk.dstate
    found, expected = subject.on(mesh, rules).pull(*arguments), subject.pull(*arguments)
    return deviation(asdict(found), asdict(expected))


def sharding_of(
    function: Callable[..., dict], arguments: tuple, shardings: tuple, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> Deviation:
    """Any function of arrays on the mesh against one device: a trainer's loss and gradients.

    Args:
      function: to a dict of trees of arrays, of which each entry is measured by its own norm.
      arguments: NumPy arrays, or trees of them.
      shardings: how they are laid out on the mesh, of the same structure.
      mesh: whose devices take the place of one.
      rules: the mesh axes of logical axes.
    """
    expected = jax.device_get(jax.jit(function)(*arguments))
    with on_mesh(mesh, rules):
        found = jax.device_get(jax.jit(function)(*jax.device_put(arguments, shardings)))
    return deviation(found, expected)
