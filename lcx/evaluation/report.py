"""Pictures of a run."""

import io
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lcx.files import read_lines, write_bytes

SMOOTHING = 0.05  # share of the curve over which the smoothed line averages


def plot_loss(
    metrics_path: epath.PathLike,
    png_path: epath.PathLike,
    baselines: Mapping[str, float] | None = None,
    heldout: Mapping[int, float] | None = None,
) -> None:
    """Draws the loss curve of a run as a PNG of 900 x 540 pixels, all losses in bits per token.

    Args:
      metrics_path: metrics.jsonl, of which step and loss (nats per token) are read, and heldout_loss where it is there.
      png_path: the picture.
      baselines: horizontal lines, name to bits per token.
      heldout: further held-out losses, step to bits per token.
    """
    lines = read_lines(metrics_path)
    trained = _bits_by_step(lines, "loss")
    scored = _bits_by_step(lines, "heldout_loss") | dict(heldout or {})

    figure = Figure(figsize=(9.0, 5.4), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (bits per token)")
    if trained:
        steps, losses = np.array(list(trained)), np.array(list(trained.values()))
        smooth = _smoothed(losses)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"training, smoothed ({smooth[-1]:.2f})")
    if scored:
        steps, losses = zip(*sorted(scored.items()), strict=True)
        style = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "zorder": 3}
        axes.plot(steps, losses, color="tab:orange", label=f"held out ({losses[-1]:.2f})", **style)
    for (name, bits), style in zip((baselines or {}).items(), itertools.cycle(("--", ":", "-.")), strict=False):
        axes.axhline(bits, color="dimgray", linestyle=style, label=f"{name} ({bits:.2f})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(png_path, buffer.getvalue())


def _bits_by_step(lines: list[dict[str, Any]], field: str) -> dict[int, float]:
    """A field in nats, in bits by step, where it is a number."""
    there = (line for line in lines if isinstance(line.get(field), int | float) and isinstance(line.get("step"), int))
    return {line["step"]: line[field] / math.log(2) for line in there}


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average over SMOOTHING of the values, centred, so that it does not lag.

    At the beginning, where losses fall fast, it narrows; at the end, where its value is read, it looks back only.
    """
    count, index = len(values), np.arange(len(values))
    back = np.minimum(round(SMOOTHING * count / 2), index)
    forward = np.minimum(back, count - 1 - index)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + forward + 1] - sums[index - back]) / (back + forward + 1)
