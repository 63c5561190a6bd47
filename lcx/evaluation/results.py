"""What suites found, kept: evaluation/<suite>.json with its history, a picture beside it, and TensorBoard."""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcx.evaluation.suite import Curves, Finding, Grid, Picture
from lcx.files import read_json, write_bytes, write_json

PICTURES = {"grid": Grid, "curves": Curves}
COLUMNS = 3  # pictures side by side


@dataclass
class Result:
    """All that one run of a suite found."""

    scalars: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Self:
        """The findings by their names."""
        result = cls()
        for name, value in findings:
            place = result.pictures if isinstance(value, Grid | Curves) else result.scalars
            place[name] = value
        return result

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: a number that is not finite is null."""
        pictures = {name: {"kind": picture.kind, **asdict(picture)} for name, picture in self.pictures.items()}
        return _plain({"scalars": self.scalars, "pictures": pictures})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        pictures = {}
        for name, record in values["pictures"].items():
            arguments = {key: value for key, value in record.items() if key != "kind"}
            pictures[name] = PICTURES[record["kind"]](**arguments)
        return cls(dict(values["scalars"]), pictures)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(folder: epath.PathLike, name: str, result: Result, step: int, about: Mapping[str, Any]) -> None:
    """Writes <folder>/<name>.json and, where there are pictures, <name>.png.

    The file has the newest step's scalars and pictures, and `history`: the scalars of every step that was evaluated the
    same way. about: what else is to be known, the options for one; another `about` begins a new history.
    """
    folder = epath.Path(folder)
    path = folder / f"{name}.json"
    about = _plain(about)
    history = []
    if path.exists():
        before = read_json(path)
        if {key: before.get(key) for key in about} == about:
            history = [past for past in before["history"] if past["step"] != step]
    found = result.to_dict()
    history = sorted([*history, {"step": step, "scalars": found["scalars"]}], key=lambda past: past["step"])
    if history[-1]["step"] == step:  # an older step was evaluated later: the file stays the newest one's
        write_json(path, {**about, "step": step, **found, "history": history})
        if result.pictures:
            write_bytes(folder / f"{name}.png", to_bytes(draw_all(result.pictures, f"{name}, step {step:,}"), "png"))
    else:
        write_json(path, {**before, "history": history})


def load(path: epath.PathLike) -> tuple[dict[str, Any], Result]:
    """(all that the file says, its result). Raises UserError for a file that is none of ours."""
    values = read_json(path)
    return values, Result.from_dict(values)


class Board:
    """TensorBoard, in a folder; a context that closes it. None as the folder: nothing is written."""

    def __init__(self, folder: epath.PathLike | None):
        self._writer = None
        if folder is not None:
            from tensorboardX import SummaryWriter  # half a second, and not always wanted

            self._writer = SummaryWriter(str(folder))

    def log(self, name: str, result: Result, step: int) -> None:
        """Scalars as name/scalar, pictures as images."""
        if self._writer is None:
            return
        for scalar, value in result.scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{name}/{scalar}", value, step)
        for title, picture in result.pictures.items():
            figure = draw_all({title: picture})
            self._writer.add_image(f"{name}/{title}", pixels(figure), step, dataformats="HWC")
        self._writer.flush()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()


def draw_all(pictures: Mapping[str, Picture], title: str = "") -> Figure:
    """Every picture in a panel of its own."""
    columns = min(COLUMNS, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), dpi=100, layout="constrained")
    for number, (name, picture) in enumerate(pictures.items(), start=1):
        draw(figure.add_subplot(rows, columns, number, title=name), picture)
    if title:
        figure.suptitle(title)
    return figure


def draw(axes: Axes, picture: Picture) -> None:
    """One picture on axes that are there."""
    (_draw_grid if isinstance(picture, Grid) else _draw_curves)(axes, picture)


def _draw_grid(axes: Axes, grid: Grid) -> None:
    values = np.array([[math.nan if value is None else value for value in row] for row in grid.values], float)
    low, high = grid.limits or (None, None)
    colours = "RdYlGn" if grid.limits else "viridis"  # red is bad only where numbers are scores
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_xticks(range(len(grid.columns)), [_label(column) for column in grid.columns])
    axes.set_yticks(range(len(grid.rows)), [_label(row) for row in grid.rows])
    axes.set(xlabel=grid.column_name, ylabel=grid.row_name)
    axes.figure.colorbar(image, ax=axes, label=grid.value_name)
    if values.size <= 150:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.45 else "white"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)


def _draw_curves(axes: Axes, curves: Curves) -> None:
    for name, line in curves.lines.items():
        points = [(x, y) for x, y in zip(curves.x, line, strict=True) if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 20 else None, markersize=4, label=name)
    for name, place in curves.marks.items():
        axes.axvline(place, color="dimgray", linestyle=":", label=name)
    if curves.log_x:
        axes.set_xscale("log", base=2)
        if len(curves.x) <= 12:
            axes.set_xticks(list(curves.x), [_label(x) for x in curves.x], rotation=45)
    axes.set(xlabel=curves.x_name, ylabel=curves.y_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if len(curves.lines) <= 12:
        axes.legend(frameon=False, fontsize=8)


def _label(value: Any) -> str:
    """Lengths as people say them: 16384 is 16K."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer() and value >= 1024)
    if whole and value >= 1024 and int(value) % 1024 == 0:
        return f"{int(value) // 1024}K"
    return f"{value:g}" if isinstance(value, float) else str(value)


def to_bytes(figure: Figure, form: str) -> bytes:
    """A figure as a file: "png" or "svg"."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else None  # no date, no addresses
    figure.savefig(buffer, format=form, metadata=nothing)
    return buffer.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]
