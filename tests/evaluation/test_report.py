import io
import json
import math

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from lcx.evaluation import report
from lcx.evaluation.report import plot_loss


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, besides being written."""
    drawn = []

    def keep(*arguments, **options):
        drawn.append(matplotlib.figure.Figure(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(report, "Figure", keep)
    return drawn


def write(path, losses, heldout=()):
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    for step, loss in heldout:
        lines[step - 1]["heldout_loss"] = loss
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_draws_bits_per_token(tmp_path, figures):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "evaluation" / "loss.png"
    nats = [5.0 - step / 50 for step in range(200)]
    nats[7] = None
    write(metrics, nats, heldout=[(100, 2.0), (200, 1.0)])
    plot_loss(metrics, picture, baselines={"byte bigram": 3.46}, heldout={200: 1.25})
    assert matplotlib.image.imread(io.BytesIO(picture.read_bytes())).shape[:2] == (540, 900)

    (axes,) = figures[0].axes
    raw, smooth, heldout, baseline = axes.lines
    bits = np.array([loss for loss in nats if loss is not None]) / math.log(2)
    np.testing.assert_allclose(raw.get_ydata(), bits)
    assert list(raw.get_xdata()) == [step for step in range(1, 201) if step != 8]
    np.testing.assert_allclose(smooth.get_ydata()[20:-6], bits[20:-6], err_msg="a straight line stays: no lag")
    np.testing.assert_allclose(heldout.get_xydata(), [(100, 2.0 / math.log(2)), (200, 1.25)])
    assert list(baseline.get_ydata()) == [3.46, 3.46] and baseline.get_linestyle() == "--"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1:] == ["held out (1.25)", "byte bigram (3.46)"]
    assert axes.get_xlabel() == "step" and "bits per token" in axes.get_ylabel()


def test_smoothing_halves_noise_and_ends_in_an_average(tmp_path, figures):
    noise = np.random.default_rng(0).normal(2.0, 0.1, 400)
    write(tmp_path / "m", noise)
    plot_loss(tmp_path / "m", tmp_path / "p.png")
    smooth = figures[0].axes[0].lines[1].get_ydata() * math.log(2)
    assert smooth[20:].std() < noise.std() / 2
    assert smooth[-1] == pytest.approx(noise[-11:].mean())
    assert smooth[0] == pytest.approx(noise[0])


@pytest.mark.parametrize("losses", [[], [None], [2.0]])
def test_short_runs_and_torn_lines_are_drawn(tmp_path, losses):
    write(tmp_path / "m", losses)
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 9, "lo')
    plot_loss(tmp_path / "m", tmp_path / "p.png", {"byte bigram": 3.46})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
