"""What layers concentrate on: SAMBA's entropies of attention and of selection (Ren et al., arXiv 2406.07522).

Attention: the mean over heads and queries of -sum_k A ln A. Selection: with p_t = dt_t / sum dt over the sequence, the
mean over channels of -sum_t p_t ln p_t. Both in nats; ln of the number of tokens is the largest that there can be.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lcx.errors import UserError
from lcx.evaluation.observe import observed
from lcx.evaluation.streaming import stream
from lcx.evaluation.suite import Curves, Finding, Grid, Material
from lcx.models import LanguageModel
from lcx.schema import limited


@dataclass(frozen=True)
class Options:
    """What is read."""

    files: str = ""  # a file or folder of text; "": what the run holds out
    length: int | None = limited(None, minimum=2)  # tokens of a sequence; None: of training
    rows: int = limited(4, minimum=1)  # sequences
    chunk_size: int = limited(256, minimum=1)  # tokens whose attention weights exist at once


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields each layer's entropy, mean ones by kind, attention's by head and by position."""
    length = options.length or material.train_length
    text = material.stretch(options.files, options.rows * length + 1)
    rows = np.stack([material.begun(text[i * length : (i + 1) * length + 1]) for i in range(options.rows)])
    attention, selection = entropies(observed(model), rows[:, : length + 1], options.chunk_size)
    if not attention and not selection:
        raise UserError("the suite entropy looks at attention and at Mamba layers, and this model has neither.")
    layers = {f"attention_{name}": found.mean((1, 2, 3)) for name, found in attention.items()}
    layers |= {f"selection_{name}": found.mean((1, 2)) for name, found in selection.items()}
    for name, by_period in layers.items():
        for period, value in enumerate(by_period):
            yield f"{name}_{period}", float(value)
    for kind in ("attention", "selection"):
        found = [by_period.mean() for name, by_period in layers.items() if name.startswith(kind)]
        if found:
            yield f"mean_{kind}", float(np.mean(found))
    for name, found in attention.items():
        heads = found.mean((1, 2))  # [periods, heads]
        labels = [list(range(size)) for size in heads.shape]
        yield f"entropy by head of {name}", Grid(*labels, heads.tolist(), "period", "head", "nats", None)
        lines = {f"period {period}": by_position.mean((0, 2)).tolist() for period, by_position in enumerate(found)}
        places = list(range(1, found.shape[2] + 1))
        yield f"entropy by position of {name}", Curves(places, lines, "position", "nats", log_x=True)


def entropies(
    model: LanguageModel, rows: np.ndarray, chunk_size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(attention's entropies [periods, batch, time, heads], selection's [periods, batch, channels]), by layer.

    Args: model, as of `observed`; rows, int32 [batch, time + 1].
    """
    time = rows.shape[1] - 1
    size = next(size for size in range(min(chunk_size, time), 0, -1) if time % size == 0)  # no filling in any sum
    attention: dict[str, list] = {}
    sums: dict[str, list] = {}
    for piece in stream(model, rows, size, score=False):
        for key, mixers in piece.metrics.items():
            for metrics in mixers.values():
                if "entropy" in metrics:
                    attention.setdefault(key, []).append(np.asarray(metrics["entropy"]))
                if "dt_sum" in metrics:
                    found = np.stack([np.asarray(metrics[name], np.float64) for name in ("dt_sum", "dt_log_sum")])
                    sums.setdefault(key, []).append(found)
    selection = {}
    for key, found in sums.items():
        total, logarithms = np.sum(found, axis=0)
        selection[key] = np.log(total) - logarithms / total
    return {key: np.concatenate(found, axis=2) for key, found in attention.items()}, selection
