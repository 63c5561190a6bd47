"""The page of several runs, where they are many."""

import warnings

import pytest

from lcx.evaluation.compare import MANY, _curves
from lcx.evaluation.results import to_bytes
from lcx.evaluation.suite import Curves


@pytest.mark.parametrize("count", [MANY, 3 * MANY])
def test_names_of_many_runs_leave_room_for_their_curves(count):
    curves = {f"run-{i}": Curves([64, 128], {"a": [i, 1.0], "b": [0.0, i]}, "tokens", "accuracy") for i in range(count)}
    figure = _curves("accuracy", curves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that has no room
        to_bytes(figure, "svg")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert all(axes.get_position().width > 0.2 for axes in figure.axes)
    legends = [axes.get_legend() for axes in figure.axes] if count == MANY else figure.legends
    assert all(len(legend.get_texts()) == count for legend in legends)
