"""Every mixer of the table, a mixer of a user's, and the stacks of all families and ablations obey the laws."""

from functools import cache

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcx import laws
from lcx.config import Config, load_config
from lcx.mixers import MIXERS, find_mixer

TIME = 16
LENGTHS = (1, 2, 3, 7, 16)  # of chunks and of documents; each is one compiled function
ROWS = 4
USER_MIXER = "examples.moving_average:MovingAverage"
FAMILIES = ("transformer", "mamba", "samba", "infini")
# The same mixers and patterns with other options: in `make drills`.
ABLATIONS = (
    "sink",
    "sink:form=token,window=5",
    "infini:update=segment_delta",
    "sink:form=zero,window=5",
    "samba:pattern=mamba-swa-mlp",
    "samba:pattern=mamba-mlp",
    "samba:pattern=swa-mlp",
    "samba:pattern=nope",
    "samba:pattern=two-windows",
    "samba:full_attention=1",
    "mamba2",
)
EXAMPLES = 12

MIXER_EXAMPLES = [
    (name, example)
    for name, mixer in (*MIXERS.items(), (USER_MIXER, find_mixer(USER_MIXER)))
    for example in mixer.examples
]


def subjects(law: str) -> list:
    """Mixers that do not declare to break the law, in both dtypes.

    Families in float32, and their ablations, are left to `make drills`.
    """
    mixers = [f"{name}-{example}" for name, example in MIXER_EXAMPLES if law not in find_mixer(name).lawful_except]
    later = [(family, "float32") for family in FAMILIES] + [(family, "float64") for family in ABLATIONS]
    return (
        [(name, dtype) for name in mixers for dtype in ("float64", "float32")]
        + [(f"family-{family}", "float64") for family in FAMILIES]
        + [pytest.param(f"family-{family}", dtype, marks=pytest.mark.slow) for family, dtype in later]
    )


@cache
def subject_of(name: str, dtype: str) -> laws.Subject:
    """The subject of a test, made once, so that its compiled functions are shared."""
    if name.startswith("family-"):
        return laws.stack_subject(name, small_model(name.removeprefix("family-"), dtype))
    kind, _, variant = name.rpartition("-")
    mixer = find_mixer(kind)
    return laws.mixer_subject(name, mixer, mixer.examples[variant], dtype)


def small_model(family: str, dtype: str):
    """The tiny size of a family, narrower still, with windows shorter than a row and several kernel chunks in it."""
    file, _, options = family.partition(":")
    config = load_config(f"configs/{file}.py:{options}")
    periods = min(config.model.periods, 2)
    config.model.update(d_model=32, periods=periods, param_dtype=dtype, compute_dtype=dtype, residual_dtype=dtype)
    small = {
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "infini": {"num_heads": 4, "num_kv_heads": 2, "segment_length": 4},
        "mlp": {"d_ff": 48},
        "mamba": {"state_size": 4, "chunk_size": 4},
        "mamba2": {"state_size": 4, "chunk_size": 4, "head_dim": 16, "num_groups": 2},
    }
    with config.unlocked():
        for name, record in config.model.mixers.items():
            record.update(small[record["type"]])
            if record.get("window"):
                record["window"] = 9 if name == "wide" else 5
    return Config.from_dict(config).model


def composition(draw, total: int) -> list[int]:
    """Numbers of LENGTHS that add up to total."""
    parts = []
    while sum(parts) < total:
        left = total - sum(parts)
        parts.append(draw(st.sampled_from([length for length in LENGTHS if length <= left])))
    return draw(st.permutations(parts))


@st.composite
def packings(draw):
    """Arguments of `laws.pack`: each draw has a row of padding alone, a document longer than its row that continues a
    state, a document of one token, and rows that start anywhere on states that hold anything."""
    with_single = [1, *composition(draw, TIME - 1)]
    rows = [[TIME], [TIME], with_single, composition(draw, TIME)]
    held = st.integers(0, 7)
    return dict(
        rows=rows,
        first_positions=[0, draw(st.integers(1, 9)), 0, draw(st.integers(0, 9))],
        lengths=[draw(held), draw(held), draw(held), draw(st.integers(0, 7))],
        padding=[1, 0, draw(st.integers(0, 1)), draw(st.integers(0, 2))],
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def lawful(law):
    """Runs a law on every subject that does not declare to break it, in both dtypes, float64 with 64-bit JAX."""

    def decorate(test):
        @pytest.mark.parametrize("name, dtype", subjects(law))
        @settings(max_examples=EXAMPLES)
        @given(data=st.data())
        def run(name, dtype, data):
            with jax.enable_x64(dtype == "float64"):
                subject = subject_of(name, dtype)
                packing = data.draw(packings())
                packing["lengths"][0] = 7  # the capacity of all states is one, whatever is drawn
                test(subject, laws.pack(subject, **packing), laws.TOLERANCE[dtype], data.draw)

        run.__name__ = test.__name__
        run.__doc__ = test.__doc__
        return run

    return decorate


@lawful("causality")
def test_causality(subject, chunk, tolerance, draw):
    """No gradient from a token to a later one, and no output that moves with it: exactly."""
    found = laws.causality(subject, chunk, last=draw(st.integers(0, TIME - 2)))
    assert found.value == 0, found


@lawful("continuation")
def test_continuation(subject, chunk, tolerance, draw):
    """Any split, single tokens included, gives the outputs, states and gradients of the whole."""
    found = laws.continuation(subject, chunk, composition(draw, TIME))
    assert found.value <= tolerance, found


@lawful("continuation")
def test_decode_continues(subject, chunk, tolerance, draw):
    """Token by token is a split like any other."""
    found = laws.continuation(subject, chunk, [1] * TIME)
    assert found.value <= tolerance, found


@lawful("continuation")
def test_empty_state(subject, chunk, tolerance, draw):
    """No state and an empty state are the same start."""
    found = laws.empty_state(subject, chunk)
    assert found.value <= tolerance, found


@lawful("isolation")
def test_isolation_bitwise(subject, chunk, tolerance, draw):
    """Whatever else is in the row, a document's outputs and gradients stay the same to the bit."""
    by_row = [[document for document in chunk.documents if document.row == row] for row in range(ROWS)]
    found = laws.isolation_bitwise(subject, chunk, [draw(st.sampled_from(documents)) for documents in by_row])
    assert found.value == 0, found


@lawful("isolation")
def test_isolation_alone(subject, chunk, tolerance, draw):
    """A packed document is the document alone."""
    found = laws.isolation_alone(subject, chunk)
    assert found.value <= tolerance, found
