"""The folder of a sweep, DIR: who holds it, what is to be run, what has happened.

sweep.json        the trials: settings, sizes, what was solved for
configs/NAME.json the whole config of a trial, which `lcx train --config=` takes
trials/NAME/      the trial's workdir
logs/NAME.log     what the trial said, of all its attempts
journal.jsonl     a line for each beginning and end of an attempt
study.jsonl       optuna's storage, of a search
report.html, report.json
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.files import FORMAT_VERSION, lock_file, read_json, read_lines, write_json
from lcx.schema import plain
from lcx.sweeps.expand import Trial


class Folder:
    """Paths, and what is written to them."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self.sweep = self.path / "sweep.json"
        self.journal = self.path / "journal.jsonl"
        self.study = self.path / "study.jsonl"

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.json"

    def workdir(self, name: str) -> Path:
        return self.path / "trials" / name

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if need be, for this process alone.

        Raises UserError where another process has it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = lock_file(self.path / ".lock", f"the sweep's folder {self.path}")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; use another --workdir.") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def write_trial(self, trial: Trial) -> None:
        """Puts the trial's config where `lcx train` reads it. Raises UserError where it has begun with another one."""
        config = {"config": plain(trial.config)}
        path = self.config(trial.name)
        if path.exists():
            if read_json(path) == json.loads(json.dumps(config)):
                return
            _check_same(trial.name, self.path, read_json(path)["config"], config["config"])
        write_json(path, config)

    def write_trials(self, trials: list[Trial], about: Mapping[str, Any]) -> None:
        """Writes sweep.json: `about` the sweep, and of each trial all but its config."""
        records = [{key: plain(value) for key, value in asdict(trial).items() if key != "config"} for trial in trials]
        write_json(self.sweep, {**about, "trials": records})

    def record(self, trial: str, event: str, **more: Any) -> None:
        """Appends to the journal: one write, so that a kill tears no line but the last."""
        line = {"format_version": FORMAT_VERSION, "trial": trial, "event": event, "time": time.time(), **more}
        data = json.dumps(line).encode() + b"\n"
        if self.journal.exists() and not self.journal.read_bytes().endswith(b"\n"):
            data = b"\n" + data
        with open(self.journal, "ab", buffering=0) as file:
            file.write(data)

    def history(self) -> list[dict[str, Any]]:
        """The whole lines of the journal."""
        return read_lines(self.journal)

    def result(self, trial: Trial, metric: str) -> float | None:
        """The metric of a trial that has come to its last step; None of any other."""
        values = read_result(self.workdir(trial.name), "heldout")
        ended = (self.workdir(trial.name) / "usage.json").exists()  # what a trial writes last
        if not ended or values.get("step", -1) < trial.config["train"]["steps"]:
            return None
        file, _, key = metric.partition(".")
        found = lookup(read_result(self.workdir(trial.name), file), key)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else float("nan")


def read_result(workdir: Path, file: str) -> dict[str, Any]:
    """evaluation/FILE.json of a run; {} where it is not there or not whole."""
    try:
        return read_json(workdir / "evaluation" / f"{file}.json")
    except (OSError, UserError):
        return {}


def lookup(values: Any, key: str) -> Any:
    """A number in nested dicts by its dotted key; None where it is not there."""
    for word in key.split("."):
        values = values.get(word) if isinstance(values, dict) else None
    return values


# Fields that a trial may have otherwise when it is resumed; more than these its run would refuse as well.
MAY_CHANGE = ("train.steps", "checkpoint.", "evaluation.", "logging.", "health.", "data.worker", "data.max_bad_records")


def _check_same(name: str, path: Path, there: Any, here: Any, key: str = "") -> None:
    if isinstance(there, dict) and isinstance(here, dict):
        for word in {**there, **here}:
            dotted = f"{key}.{word}" if key else word
            if word in there and word in here:  # a field that is newer, or gone, is the run's to judge
                _check_same(name, path, there[word], here[word], dotted)
    elif there != json.loads(json.dumps(here)) and not key.startswith(MAY_CHANGE):
        raise UserError(
            f'the trial "{name}" in {path} has begun with {key} = {json.dumps(there)}, not {json.dumps(here)}; '
            "use another --workdir."
        )
