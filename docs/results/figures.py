"""The tables and pictures of docs/results, from the workdirs of the two sweeps.

python docs/results/figures.py runs/long_context runs/recall
"""

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
MODELS = ("transformer", "sink", "window", "infini", "mamba", "samba")
STATES = {"mamba": 128, "mamba2": 128, "window": 128}  # numbers that one of `state` means: channels; a key and a value
Table = dict[tuple, dict[int, list[float]]]  # of each model (and learning rate): values by length, one a seed


def scalars(sweep: Path, suite: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The name of each trial and what the suite found of it."""
    for path in sorted(sweep.glob(f"trials/*/evaluation/{suite}.json")):
        yield path.parts[-3], json.loads(path.read_text())["scalars"]


def long_context(sweep: Path, suite: str, scalar: str) -> Table:
    found: Table = defaultdict(lambda: defaultdict(list))
    for name, values in scalars(sweep, suite):
        for length in LENGTHS:
            found[name.split("-seed")[0],][length].append(values[f"{scalar}_at_{length}"])
    return found


def recall(sweep: Path) -> Table:
    found: Table = defaultdict(lambda: defaultdict(list))
    for name, values in scalars(sweep, "recall"):
        model, _, rate = name.partition("-learning_rate=")
        for scalar, value in values.items():
            if length := scalar.rpartition("_at_")[2]:
                if length.isdigit():
                    found[model, rate][int(length)].append(value)
    return found


def write(table: Table, columns: tuple[str, ...], path: Path) -> None:
    """A line for each model and length, with the values of all seeds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, "length", "values"])
        for key, by_length in sorted(table.items()):
            for length, values in sorted(by_length.items()):
                writer.writerow([*key, length, " ".join(f"{value:.4f}" for value in values)])


def draw(axes: Axes, table: Table, what: str) -> None:
    """The mean over seeds against the length, and where the seeds lie."""
    for number, model in enumerate(MODELS):
        by_length = table[model,]
        axes.plot(LENGTHS, [mean(by_length[length]) for length in LENGTHS], "o-", label=model, color=f"C{number}")
        for length in LENGTHS:
            axes.plot([length] * len(by_length[length]), by_length[length], "_", color=f"C{number}", alpha=0.5)
    axes.set(xscale="log", xlabel="bytes", title=what)
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.minorticks_off()
    axes.axvline(512, color="gray", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)


def draw_recall(axes: Axes, table: Table) -> None:
    """The best accuracy of the learning rates against the numbers that a layer's state holds."""
    best = {}
    for (name, _), by_length in table.items():
        (values,) = by_length.values()
        best[name] = max(best.get(name, 0.0), mean(values))
    for model, numbers_of_one in STATES.items():
        states = sorted(int(name.rpartition("-")[2]) for name in best if name.rpartition("-")[0] == model)
        accuracies = [best[f"{model}-{state}"] for state in states]
        axes.plot([numbers_of_one * state for state in states], accuracies, "o-", label=model)
    axes.axhline(best["attention"], color="gray", linestyle="--", label="attention")
    axes.set(xscale="log", xlabel="numbers in the state of a layer", ylabel="accuracy at 16 pairs", ylim=(0, 1.03))
    axes.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1,024", "2,048", "4,096"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def main(long_sweep: str, recall_sweep: str) -> None:
    passkey = long_context(Path(long_sweep), "passkey", "accuracy")
    bits = long_context(Path(long_sweep), "perplexity", "bits")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, passkey, "passkeys found")
    draw(right, bits, "bits per byte of held-out documents cut to a length")
    left.legend()
    figure.savefig(HERE / "long_context.png", dpi=110)
    write(passkey, ("model",), HERE / "passkey.csv")
    write(bits, ("model",), HERE / "bits.csv")
    found = recall(Path(recall_sweep))
    figure = Figure(figsize=(6, 4), layout="constrained")
    draw_recall(figure.subplots(), found)
    figure.savefig(HERE / "recall.png", dpi=110)
    write(found, ("model", "learning_rate"), HERE / "recall.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])
