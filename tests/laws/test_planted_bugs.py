"""The laws catch what they are there to catch: mixers with one planted bug each, and the law that finds it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lcx import laws
from lcx.errors import UserError
from lcx.mixers import MIXERS, find_mixer

MovingAverage = find_mixer("examples.moving_average:MovingAverage")


class LooksAhead(MovingAverage):
    def __call__(self, x, state, context):
        return super().__call__(x + 1e-6 * jnp.roll(x, -1, axis=1), state, context)


class DropsTheState(MovingAverage):
    def __call__(self, x, state, context):
        return super().__call__(x, None, context)


class CutsTheStatesGradient(MovingAverage):
    def __call__(self, x, state, context):
        return super().__call__(x, jax.lax.stop_gradient(state), context)


class CarriesAcrossDocuments(MovingAverage):
    def __call__(self, x, state, context):
        return super().__call__(x, state, replace(context, positions=context.positions + 1))


class TakesPositionsForLength(MovingAverage):
    """Scales by the place in the row where it should by the place in the document."""

    def __call__(self, x, state, context):
        return super().__call__(x * (1 + context.row_index[..., None].astype(x.dtype)), state, context)


class StartsWithGarbage(MovingAverage):
    def __call__(self, x, state, context):
        y, after, aux = super().__call__(x, state, context)
        return (y + 1 if state is None else y), after, aux


class Declared(DropsTheState):
    """What a mixer may do that says so."""

    examples = {"default": {}}
    lawful_except = ("continuation",)


LAWS = {
    "causality": lambda subject, chunk: laws.causality(subject, chunk, last=6),
    "continuation": lambda subject, chunk: laws.continuation(subject, chunk, [3, 5, 4]),
    "empty_state": laws.empty_state,
    "isolation_bitwise": lambda subject, chunk: laws.isolation_bitwise(subject, chunk, [chunk.documents[2]]),
    "isolation_alone": laws.isolation_alone,
}
PLANTED = {
    LooksAhead: {"causality", "continuation", "isolation_bitwise", "isolation_alone"},
    DropsTheState: {"continuation"},
    CutsTheStatesGradient: {"continuation"},
    CarriesAcrossDocuments: {"isolation_bitwise", "isolation_alone"},
    TakesPositionsForLength: {"isolation_alone"},
    StartsWithGarbage: {"empty_state"},
    MovingAverage: set(),
}


DECLARED = [
    (mixer, variant) for mixer in (*MIXERS.values(), Declared) if mixer.lawful_except for variant in mixer.examples
]


def broken(mixer: type, options: dict) -> dict[str, float]:
    """The laws that a mixer breaks on one device, and by how much."""
    with jax.enable_x64(True):
        subject = laws.mixer_subject(mixer.__name__, mixer, options, "float64")
        packing = dict(first_positions=[3, 0], lengths=[7, 4], padding=[0, 0], seed=0)
        chunk = laws.pack(subject, rows=[[12], [5, 7]], **packing)
        found = {name: law(subject, chunk).value for name, law in LAWS.items()}
    allowed = dict.fromkeys(LAWS, laws.TOLERANCE["float64"]) | {"causality": 0, "isolation_bitwise": 0}
    return {name: value for name, value in found.items() if value > allowed[name]}


@pytest.mark.parametrize("mixer", PLANTED, ids=lambda mixer: mixer.__name__)
def test_each_bug_is_caught_by_its_laws_and_by_no_other(mixer):
    assert broken(mixer, {}).keys() == PLANTED[mixer]


@pytest.mark.parametrize("mixer, variant", DECLARED)
def test_a_mixer_breaks_the_laws_that_it_declares_and_no_other(mixer, variant):
    law_of = {name: "continuation" if name == "empty_state" else name.split("_")[0] for name in LAWS}
    found = {law_of[name] for name in broken(mixer, mixer.examples[variant])}
    assert found == set(mixer.lawful_except) & set(law_of.values())


def test_exceptions_are_names_of_laws():
    assert laws.declared_exceptions([MovingAverage, Declared]) == {"continuation": "Declared"}
    with pytest.raises(UserError, match='unknown law "continuity": did you mean "continuation"?'):
        laws.declared_exceptions([type("Misspelt", (MovingAverage,), {"lawful_except": ("continuity",)})])
