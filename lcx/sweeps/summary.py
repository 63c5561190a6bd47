"""What a sweep has come to so far, as data: report.json, which the page draws."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.files import read_json, read_lines
from lcx.sweeps.expand import Measure, Trial
from lcx.sweeps.folder import Folder, read_result
from lcx.sweeps.ladder import ladder
from lcx.sweeps.spec import Sweep

POINTS = 300  # of a curve on the page; more would not be seen


def summarize(name: str, sweep: Sweep, trials: list[Trial], folder: Folder, measure: Measure) -> dict[str, Any]:
    """The report of a sweep: its trials, groups of trials that differ in seeds alone, and the ladder of budgets.

    measure: counts "parameters" and "flops" a token of a config.
    """
    history = folder.history()
    records = [_record(sweep, trial, folder, measure, history) for trial in trials]
    return {
        "name": name,
        "metric": sweep.metric,
        "goal": sweep.goal,
        "match": sweep.match,
        "vary": sweep.vary if sweep.match in ("parameters", "flops") else None,
        "trials": records,
        "groups": groups(records, sweep.goal),
        "ladder": ladder(records) if sweep.budgets else [],
    }


def _record(
    sweep: Sweep, trial: Trial, folder: Folder, measure: Measure, history: list[dict[str, Any]]
) -> dict[str, Any]:
    workdir, config = folder.workdir(trial.name), trial.config
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if _number(line.get("step")) is not None]
    mine = [line for line in history if line.get("trial") == trial.name]
    ends = [line for line in mine if line.get("event") == "ended"]
    value = folder.result(trial, sweep.metric)
    steps, per_step = config["train"]["steps"], config["train"]["batch_size"] * config["train"]["sequence_length"]
    parameters, per_token = measure(config, "parameters"), measure(config, "flops")
    rates = [rate for line in lines[1:] or lines if (rate := _number(line.get("tokens_per_second"))) is not None]
    usage = _usage(workdir)
    return {
        "name": trial.name,
        "group": trial.group,
        "family": trial.family,
        "status": _status(value, mine),
        "settings": dict(trial.settings),
        "chosen": dict(trial.chosen),
        "size": trial.size,
        "budget": trial.budget,
        "metric": None if value is None or math.isnan(value) else value,
        "metrics": _scalars(workdir),
        "parameters": parameters,
        "flops_per_token": per_token,
        # Of the training: forward, and twice as much backward; not what remat computes again.
        "flops": None if per_token is None else 3 * per_token * steps * per_step,
        "tokens": steps * per_step,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "memory": usage.get("device_bytes") or usage.get("host_bytes"),
        "memory_of": "device" if usage.get("device_bytes") else "host" if usage.get("host_bytes") else None,
        "seconds": sum(_number(line.get("seconds")) or 0 for line in ends) or None,
        "attempts": sum(line.get("event") == "started" for line in mine),
        "curve": curve(lines, per_step),
        "config": folder.config(trial.name).relative_to(folder.path).as_posix(),
        "workdir": workdir.relative_to(folder.path).as_posix(),
        "log": folder.log(trial.name).relative_to(folder.path).as_posix(),
    }


def _status(value: float | None, mine: list[dict[str, Any]]) -> str:
    if value is not None:
        return "finished"
    last = mine[-1] if mine else {}
    if last.get("event") == "ended":
        return "failed"
    return {"started": "running", "interrupted": "interrupted"}.get(last.get("event"), "waiting")


def _scalars(workdir: Path) -> dict[str, float]:
    """The numbers of all files in evaluation/, as FILE.KEY."""
    found = {}
    for path in sorted((workdir / "evaluation").glob("*.json")):
        for key, value in read_result(workdir, path.stem).items():
            if _number(value) is not None:
                found[f"{path.stem}.{key}"] = value
    return found


def _usage(workdir: Path) -> dict[str, Any]:
    """Peak bytes, by `lcx.cli.trial`."""
    try:
        return read_json(workdir / "usage.json")
    except (OSError, UserError):
        return {}


def curve(lines: list[dict[str, Any]], tokens_per_step: int) -> dict[str, list]:
    """The training loss and the held-out loss of a run by step; thinned out to what a page shows."""
    train = [(line["step"], line["loss"]) for line in lines if _number(line.get("loss")) is not None]
    held = [(line["step"], line["heldout_loss"]) for line in lines if _number(line.get("heldout_loss")) is not None]
    return {"tokens_per_step": tokens_per_step, "loss": thinned(train), "heldout_loss": thinned(held)}


def thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """At most POINTS points: means over neighbours, at the last of their steps."""
    size = math.ceil(len(points) / POINTS) or 1
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [[piece[-1][0], statistics.fmean(value for _, value in piece)] for piece in pieces]


def groups(records: list[Mapping[str, Any]], goal: str) -> list[dict[str, Any]]:
    """Of trials that differ in seeds alone: mean, spread and range of the metric, the best first."""
    found: dict[str, list[float]] = {}
    families = {}
    for record in records:
        families[record["group"]] = record["family"]
        if record["metric"] is not None:
            found.setdefault(record["group"], []).append(record["metric"])
    rows = [
        {
            "group": group,
            "family": families[group],
            "count": len(values),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "low": min(values),
            "high": max(values),
            "values": values,
        }
        for group, values in found.items()
    ]
    return sorted(rows, key=lambda row: row["mean"], reverse=goal == "maximize")


def _number(value: Any) -> float | None:
    """A finite number, as it is; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
