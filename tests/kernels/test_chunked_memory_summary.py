"""Summaries: what a stretch does to the state, against the scan itself, composed and applied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx_kernels.chunked_memory import SegmentState, chunked_memory, chunked_memory_summary
from tests.kernels.test_chunked_memory import KINDS, assert_close, cast, draw, split_state

NAMES = ["linear", "ssd", "gated", "gated_delta_rule", "infini", "infini_delta", "infini_delta, no positions"]
SIZE, STRETCHES = 11, 3


def case_of(name: str):
    case = KINDS[name.split(",")[0]]._replace(resets=((), ()))
    if "infini" in name:  # not every stretch completes a segment
        case = case._replace(static=tuple(sorted({**case.options(), "chunk_size": 16}.items())))
    if "no positions" in name:  # each stretch completes its last
        static = {**case.options(), "chunk_size": SIZE}
        case = case._replace(first_positions=None, static=tuple(sorted(static.items())))
    return case


@functools.cache
def compiled(name: str, backend: str):
    """(scan, first phase or whole summary, second phase), jitted: of per-token arguments and marks."""
    options = dict(case_of(name).static) | {"backend": backend}
    maps = lambda arguments: {key: value for key, value in arguments.items() if key != "q"}  # noqa: E731
    scan = jax.jit(lambda arguments, marks, state: chunked_memory(**arguments, **marks, initial_state=state, **options))
    summary = jax.jit(lambda arguments, marks: chunked_memory_summary(**maps(arguments), **marks, **options))
    second = jax.jit(
        lambda arguments, marks, found: chunked_memory_summary(**maps(arguments), **marks, **options, normalizers=found)
    )
    return scan, summary, second


def leaves(state) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def found_normalizers(state):
    return (state.normalizer, state.open_normalizer) if isinstance(state, SegmentState) else state[1]


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("name", NAMES)
def test_stretches_compose(name, backend):
    """Summaries applied one after the other, and their composition, give the states of the scan."""
    case = case_of(name)
    with jax.enable_x64(True):
        arguments, rest = split_state(cast(draw(case), jnp.float64))
        scan, summarise, second = compiled(name, backend)
        for resets in ((), (11,), (3, 4, 30), (32,)):
            marks = case._replace(resets=(resets, resets[1:])).marks()
            state, whole = rest["initial_state"], None
            for start in range(0, SIZE * STRETCHES, SIZE):
                part, part_marks = jax.tree.map(lambda array: array[:, start : start + SIZE], (arguments, marks))  # noqa: B023, E501
                one = summarise(part, part_marks)
                if name.startswith("infini_delta"):  # the first phase has the normalisers alone
                    normalizers = found_normalizers(one.apply(state))
                    one = second(part, part_marks, found_normalizers(state))
                _, after = scan(part, part_marks, state)
                if name.startswith("infini_delta"):
                    assert_close(leaves(normalizers), leaves(found_normalizers(after)), 1e-10)
                assert_close(leaves(one.apply(state)), leaves(after), 1e-10)
                state, whole = after, one if whole is None else whole.then(one)
            assert_close(leaves(whole.apply(rest["initial_state"])), leaves(state), 1e-10)


@pytest.mark.parametrize("name", ["gated", "gated_delta_rule", "infini_delta"])
def test_nothing_passes_a_reset(name):
    """Not even a NaN, into a state or into a gradient."""
    case = case_of(name)._replace(time=SIZE, resets=((5,), (0,)))
    with jax.enable_x64(True):
        _nothing_passes(name, case)


def _nothing_passes(name, case):
    arguments, rest = split_state(cast(draw(case), jnp.float64))
    _, summarise, second = compiled(name, "xla")
    marks = case.marks()
    given = rest["initial_state"]
    summary = second(arguments, marks, found_normalizers(given)) if "infini" in name else summarise(arguments, marks)
    expected = summary.apply(given)
    spoilt = jax.tree.map(lambda part: part * jnp.nan, given)
    np.testing.assert_array_equal(jax.tree.leaves(summary.apply(spoilt))[0], jax.tree.leaves(expected)[0])
    gradient = jax.grad(lambda state: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(summary.apply(state))))(spoilt)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["gated_delta_rule", "infini_delta"])
def test_gradients(name):
    """The final state through the summary and straight from the scan have the same gradients."""
    case = case_of(name)._replace(time=SIZE, resets=((), (5,)))
    options, marks = dict(case.static) | {"backend": "xla"}, case.marks()

    def straight(arguments):
        return chunked_memory(**arguments, **marks, **options)[1]

    def through_summary(arguments):
        tokens, rest = split_state(arguments)
        tokens = {key: value for key, value in tokens.items() if key != "q"}
        found = {"normalizers": found_normalizers(rest["initial_state"])} if "infini" in name else {}
        return chunked_memory_summary(**tokens, **marks, **options, **found).apply(rest["initial_state"])

    def loss(function, arguments):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(arguments)))

    with jax.enable_x64(True):
        arguments = cast(draw(case), jnp.float64)
        found, expected = (
            jax.jit(jax.grad(functools.partial(loss, function)))(arguments) for function in (through_summary, straight)
        )
        assert_close(leaves(found), leaves(expected), 1e-10)


def test_mistakes_are_named():
    case = KINDS["infini_delta"]
    tokens = {key: value for key, value in draw(case).items() if key in ("k", "v")}
    good = tokens | dict(case.static) | case.marks()
    z = np.ones((2, 2, 4))
    for message, change in {
        "normalizers: shape": {"normalizers": (z[:1], z)},
        "normalizers of the open segment: shape": {"normalizers": (z, z[:1])},
        "normalizers: expected": {"normalizers": z},
        "normalizers: given": {"normalizers": (z, z), "update": "linear"},
    }.items():
        with pytest.raises(ValueError, match=message):
            chunked_memory_summary(**(good | change))
