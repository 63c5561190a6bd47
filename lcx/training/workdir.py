"""The folder of a run: one process at a time, and always the same run."""

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

from etils import epath

from lcx.config import Config
from lcx.errors import UserError
from lcx.files import is_local, line_files, lock_file, read_json, write_json
from lcx.training.heartbeats import held

# What may differ when a run is resumed. None of it changes what a step makes of a state and a batch, except that a
# schedule with an end is stretched to train.steps, that sums are rounded otherwise on another mesh or with other
# pieces, and that bad steps are told from good ones by other limits.
MAY_CHANGE = (
    "train.steps",
    "train.accumulate",
    "train.loss_chunk_size",
    "mesh.*",
    "model.remat*",
    "checkpoint.every",
    "checkpoint.keep*",
    "checkpoint.best_metric",
    "health.threshold",
    "health.patience",
    "health.max_rewinds",
    "health.step_timeout",
    "health.peer_timeout",
    "evaluation.*",
    "logging.*",
    "data.workers",
    "data.worker_processes",
    "data.max_bad_records",
)
# An imported model has no run yet: what it is trained on, and how, is what its first training says.
NOT_BEGUN = ("data.*", "train.*", "optimizer.*", "health.*", "checkpoint.*", "model.compute_dtype", "model.init")

HELD = 30.0  # seconds after which the heartbeat of a workdir on object storage has stopped
_open: set[str] = set()  # workdirs that this process holds: its own lock would not stop it from opening one again


@dataclass(frozen=True)
class Workdir:
    """Where a run keeps its things."""

    path: epath.Path

    @classmethod
    def at(cls, path: epath.PathLike) -> Self:
        """The workdir there, which need not exist yet."""
        try:
            path = epath.Path(path)
        except KeyError:
            raise UserError(f"the workdir {path} is of no storage that is known here (gs://, s3://).") from None
        return cls(path.resolve() if is_local(path) else path)  # a bucket's path would become a folder here

    @property
    def config(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def imported(self) -> epath.Path:
        """The parameters that the run begins with, as a checkpoint of step 0, where they were imported."""
        return self.path / "imported"

    @property
    def tensorboard(self) -> epath.Path:
        return self.path / "tensorboard"

    @property
    def heartbeats(self) -> epath.Path:
        """Where the processes of a run say that they live, while it runs."""
        return self.path / "heartbeats"

    @property
    def evaluation(self) -> epath.Path:
        return self.path / "evaluation"


@contextmanager
def open_workdir(path: epath.PathLike, config: Mapping[str, Any], fingerprints: Mapping[str, Any]) -> Iterator[Workdir]:
    """The workdir at `path` for the run of `config`, begun or resumed, and locked while the context lasts.

    Args:
      path: a folder, made where it is not there; on object storage it is held by a heartbeat instead of a lock.
      config: the run's whole config as dicts, lists and scalars; compared with the one of the run in the folder.
      fingerprints: what identifies the run's data, by name, likewise.

    Raises:
      UserError: the folder cannot be written, is in use, or holds another run or a run on other data.
    """
    workdir = Workdir.at(path)
    with ExitStack() as stack:
        try:
            workdir.path.mkdir(parents=True, exist_ok=True)
            if is_local(workdir.path):
                stack.callback(_unlock, workdir.path, _lock(workdir.path))
            else:
                stack.enter_context(held(workdir.path / "heartbeats" / "run", HELD))
            _register(workdir, json.loads(json.dumps({"config": config, "fingerprints": fingerprints})))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"the workdir {path} cannot be written: {error.strerror}; use another --workdir.") from None
        except ImportError as error:  # of the package that knows this kind of storage
            raise UserError(f"the workdir {path} cannot be reached: {error}.") from None
        yield workdir


def _lock(path: epath.Path) -> int:
    """The descriptor of the lock file, locked. No other descriptor of it may be opened in this process, nor closed."""
    if os.fspath(path) in _open:
        raise UserError(f"the workdir {path} is in use by this process ({os.getpid()}).")
    descriptor = lock_file(path / ".lock", f"the workdir {path}")
    _open.add(os.fspath(path))
    return descriptor


def _unlock(path: epath.Path, descriptor: int) -> None:
    os.close(descriptor)
    _open.discard(os.fspath(path))


def _register(workdir: Workdir, run: dict[str, Any]) -> None:
    """Writes config.json, or compares with the one that is there and writes down what may change."""
    if not workdir.config.exists():
        for remains, there in ((workdir.metrics, line_files(workdir.metrics)), (workdir.checkpoints, None)):
            if there or remains.exists():
                raise UserError(f"the workdir {workdir.path} holds {remains.name} of a run but no config.json.")
        write_json(workdir.config, run)
        return
    stored = read_json(workdir.config)
    if stored != run:
        _check_same_run(workdir.path, stored, run)
        write_json(workdir.config, run)


def _check_same_run(path: epath.Path, stored: dict[str, Any], run: dict[str, Any]) -> None:
    begun = stored.get("fingerprints") is not None
    free = MAY_CHANGE if begun else MAY_CHANGE + NOT_BEGUN
    for section, what in (("config", "another run"), ("fingerprints", "a run on other data"))[: 1 + begun]:
        there, here = _flatten(stored.get(section)), _flatten(run[section])
        if section == "config":  # a field that is newer than the run had its default's meaning
            there = {key: value for key, value in _flatten(Config().to_dict()).items() if key in here} | there
        for key in [*here, *(key for key in there if key not in here)]:
            values = [json.dumps(side[key]) if key in side else "absent" for side in (there, here)]
            changeable = section == "config" and any(fnmatch.fnmatchcase(key, pattern) for pattern in free)
            if values[0] == values[1] or changeable:
                continue
            if key.startswith("model."):
                what = "another model's run"
            difference = f"{key} is {values[0]} there and {values[1]} here"
            raise UserError(
                f"the workdir {path} holds {what}: {difference}; use another --workdir, which may begin from this run: "
                f"--config.checkpoint.fork={path}."
            )


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {"model.mixers.swa.window": 2048, "data.sources[0].path": ...}."""
    if isinstance(value, dict) and value:
        items = [(f"{key}.{name}" if key else name, child) for name, child in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{key}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {key: value}
    return {name: leaf for key, child in items for name, leaf in _flatten(child, key).items()}
