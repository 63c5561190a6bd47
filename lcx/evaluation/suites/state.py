"""State collapse: what happens to recurrent states beyond the training length.

Norm, mean and variance of every recurrent state over the position, as one document is read. States that a model never
learned to empty grow, or drift in a few channels, beyond the length that it was trained at, and its loss with them
(Chen et al., arXiv 2410.07145).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lcx.errors import UserError
from lcx.evaluation.streaming import stream
from lcx.evaluation.suite import Curves, Finding, Material
from lcx.models import LanguageModel
from lcx.schema import limited

STATISTICS = ("norm", "mean", "variance")


@dataclass(frozen=True)
class Options:
    """What is read."""

    files: str = ""  # a file or folder of text; "": what the run holds out
    length: int | None = limited(None, minimum=2)  # tokens; None: eight times the training length
    points: int = limited(64, minimum=1)  # places at which states are looked at, at equal distances


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields how much each mixer's state grew since the training length, and curves over the position."""
    length = options.length or 8 * material.train_length
    step = max(1, length // options.points)
    text = material.begun(material.stretch(options.files, length + 1))
    names, found, places = recurrent_states(model), [], []
    if not names:
        raise UserError("no layer of this model has a recurrent state: the suite state has nothing to look at.")
    for piece in stream(model, text[None, : length // step * step + 1], step, score=False):
        found.append({name: statistics(piece.state["layers"][name[0]][name[1]][name[2]]) for name in names})
        places.append(piece.start + step)
    trained = int(np.searchsorted(places, material.train_length))
    trained = min(trained, len(places) - 1)
    for name in names:
        label = f"{name[0]}/{name[2]}"
        values = np.stack([point[name] for point in found])  # [points, statistics, periods]
        norms = values[:, 0]
        yield f"{label}_growth", float(np.max(norms[-1] / np.maximum(norms[trained], 1e-30)))
        for i, statistic in enumerate(STATISTICS):
            lines = {f"period {period}": values[:, i, period].tolist() for period in range(values.shape[2])}
            marks = {"training length": material.train_length}
            yield f"{statistic} of {label}", Curves(places, lines, "position", statistic, marks=marks)


def recurrent_states(model: LanguageModel) -> list[tuple[str, str, str]]:
    """(layer, mixer, array) of each state that its mixer declares to be recurrent."""
    return [
        (key, name, array)
        for key, layer in model.stack.layers.items()
        for name, mixer in layer.mixers.items()
        for array in sorted(mixer.recurrent_state)
    ]


def statistics(state: jax.Array) -> np.ndarray:
    """Norm, mean and variance of each period's state [periods, batch, ...]: float [3, periods].

    The norm is that of the whole state, averaged over the batch.
    """
    return np.asarray(_statistics(state))


@jax.jit
def _statistics(state: jax.Array) -> jax.Array:
    flat = state.reshape(*state.shape[:2], -1)
    norm = jnp.mean(jnp.linalg.norm(flat, axis=-1), axis=1)
    return jnp.stack([norm, jnp.mean(flat, axis=(1, 2)), jnp.mean(jnp.var(flat, axis=-1), axis=1)])
