"""One page of several runs: their scores in tables, their curves in one picture, their grids side by side.

Runs that differ in seeds alone come as one: the mean of what was found of them.
"""

import html
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from etils import epath
from matplotlib import colormaps
from matplotlib.figure import Figure

from lcx.errors import UserError
from lcx.evaluation.results import Result, draw, load, to_bytes
from lcx.evaluation.suite import Curves, Grid, Picture
from lcx.files import write_bytes

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}td.best{font-weight:600}svg{max-width:100%;height:auto}
.scroll{overflow-x:auto}"""

MANY = 12  # runs; names of more stand beside the panels
Results = dict[str, dict[str, Result]]  # by suite, then run


def read_runs(workdirs: Sequence[epath.PathLike]) -> Results:
    """All that was found of runs, by suite and run. Raises UserError where a run was not evaluated."""
    found: Results = {}
    for workdir, label in zip(workdirs, labels(workdirs), strict=True):
        results = _read_run(workdir)
        if not results:
            raise UserError(
                f"{workdir} was not evaluated: run scripts/evaluate.py --workdir={workdir} --suite=... first."
            )
        for (suite, variant), result in results.items():
            found.setdefault(suite, {})[_name(label, variant)] = result
    return found


def read_groups(groups: Mapping[str, Iterable[epath.PathLike]]) -> Results:
    """The means of what was found of each group of runs, by suite and group; a run may have nothing yet."""
    found: dict[str, dict[str, list[Result]]] = {}
    for label, workdirs in groups.items():
        for workdir in workdirs:
            for (suite, variant), result in _read_run(workdir).items():
                found.setdefault(suite, {}).setdefault(_name(label, variant), []).append(result)
    return {
        suite: {_counted(name, len(several)): mean(several) for name, several in runs.items()}
        for suite, runs in found.items()
    }


def _read_run(workdir: epath.PathLike) -> dict[tuple[str, str], Result]:
    """The results of a run by suite and variant."""
    paths = sorted(epath.Path(workdir).glob("evaluation/*.json"))
    return {_suite(path): load(path)[1] for path in paths if path.name != "heldout.json"}


def _suite(path: epath.Path) -> tuple[str, str]:
    suite, _, variant = path.name.removesuffix(".json").partition("@")
    return suite, variant


def _name(label: str, variant: str) -> str:
    return f"{label} @ {variant}" if variant else label


def _counted(name: str, count: int) -> str:
    return name if count == 1 else f"{name} (mean of {count})"


def mean(results: Sequence[Result]) -> Result:
    """The mean of each scalar that all have, and of pictures that all have over the same axes."""
    first = results[0]
    pictures = {name: [result.pictures.get(name) for result in results] for name in first.pictures}
    return Result(
        {name: _mean([result.scalars.get(name) for result in results]) for name in first.scalars},
        {name: _mean_picture(same) for name, same in pictures.items() if len({_axes(one) for one in same}) == 1},
    )


def _axes(picture: Picture | None) -> tuple | None:
    if isinstance(picture, Grid):
        return tuple(map(str, picture.rows)), tuple(map(str, picture.columns))
    return picture and (tuple(picture.x), tuple(picture.lines))


def _mean_picture(pictures: Sequence[Picture]) -> Picture:
    first = pictures[0]
    if isinstance(first, Grid):
        rows = zip(*(picture.values for picture in pictures), strict=True)
        return replace(first, values=[[_mean(cells) for cells in zip(*row, strict=True)] for row in rows])
    lines = {name: [picture.lines[name] for picture in pictures] for name in first.lines}
    return replace(first, lines={name: list(map(_mean, zip(*line, strict=True))) for name, line in lines.items()})


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def labels(workdirs: Sequence[epath.PathLike]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [epath.Path(workdir).parts for workdir in workdirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("--compare names one run twice.")


def write_page(path: epath.PathLike, results: Results, title: str = "Evaluation") -> None:
    """Writes the page, one file that needs no other."""
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{sections(results)}</html>\n"
    )
    write_bytes(path, page.encode())


def sections(results: Results) -> str:
    """All suites as HTML: what the page of a sweep has as well."""
    return "".join(f"<section>{_section(suite, runs)}</section>" for suite, runs in sorted(results.items()))


def _section(suite: str, runs: Mapping[str, Result]) -> str:
    names = dict.fromkeys(name for result in runs.values() for name in result.pictures)
    pictures = [_picture(name, runs) for name in names]
    return f"<h2>{html.escape(suite)}</h2>{_table(runs)}{''.join(pictures)}"


def _table(runs: Mapping[str, Result]) -> str:
    names = list(dict.fromkeys(name for result in runs.values() for name in result.scalars))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = [
        f"<tr><td>{html.escape(run)}</td>{''.join(_cell(result.scalars.get(name)) for name in names)}</tr>"
        for run, result in runs.items()
    ]
    return f'<div class="scroll"><table><tr><th>run</th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(value: float | None) -> str:
    return "<td></td>" if value is None else f"<td>{value:.4g}</td>"


def _picture(name: str, runs: Mapping[str, Result]) -> str:
    there = {run: result.pictures[name] for run, result in runs.items() if name in result.pictures}
    grids = {run: picture for run, picture in there.items() if isinstance(picture, Grid)}
    curves = {run: picture for run, picture in there.items() if isinstance(picture, Curves)}
    figure = _grids(name, grids) if grids else _curves(name, curves)
    return _svg(figure)


def _grids(name: str, grids: Mapping[str, Grid]) -> Figure:
    columns = min(3, len(grids))
    rows = -(-len(grids) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    figure.suptitle(name)
    for number, (run, grid) in enumerate(grids.items(), start=1):
        draw(figure.add_subplot(rows, columns, number, title=run), grid)
    return figure


def _curves(name: str, curves: Mapping[str, Curves]) -> Figure:
    """A panel for each line, with that line of every run; runs need not have the same places."""
    lines = list(dict.fromkeys(line for picture in curves.values() for line in picture.lines))
    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)
    many = len(curves) > MANY
    beside = 0.2 * len(curves) if many else 0.0  # inches that the names of all runs need, one below the other
    figure = Figure(figsize=(5.0 * columns + 3.0 * many, max(3.6 * rows, beside)), layout="constrained")
    figure.suptitle(name)
    for number, line in enumerate(lines, start=1):
        axes = figure.add_subplot(rows, columns, number, title=line)
        if many:
            axes.set_prop_cycle(color=colormaps["turbo"](np.linspace(0, 1, len(curves))))
        having = {run: picture for run, picture in curves.items() if line in picture.lines}
        for i, (run, picture) in enumerate(having.items()):
            marks = picture.marks if i == len(having) - 1 else {}
            draw(axes, replace(picture, lines={run: picture.lines[line]}, marks=marks))
        if many:
            axes.get_legend().remove()
    if many:
        pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
        handles = {label: handle for pair in pairs for handle, label in pair}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _svg(figure: Figure) -> str:
    text = to_bytes(figure, "svg").decode()
    return f'<div class="scroll">{text[text.index("<svg") :]}</div>'
