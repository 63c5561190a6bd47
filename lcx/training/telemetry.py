"""What a run says while it runs: metrics.jsonl, TensorBoard, and a progress bar or plain lines on the console."""

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lcx.errors import UserError
from lcx.files import JsonLines, cut_lines, is_local

# What each line of metrics.jsonl has; more scalars may follow. Each line carries the format_version, so that a line
# taken out of its file still says what it is.
FIELDS = (
    "step",  # updates made so far
    "data_index",  # of the step's batch
    "loss",  # nats per token
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "learning_rate",
    "grad_norm",  # before clipping
    "mfu",  # None where the hardware's peak is not known
    "skipped",  # 1 where the step was bad and changed nothing, else 0; such a step is always logged
    "batch_hash",
)


class Telemetry:
    """The reports of one run, from the step that it was restored to; a context that ends them."""

    def __init__(
        self,
        metrics: epath.PathLike,
        steps: int,
        restored_step: int = 0,
        tensorboard: epath.PathLike | None = None,
        console: Console | None = None,
    ):
        """Cuts what was logged after `restored_step` and goes on from there.

        Args:
          metrics: the path of metrics.jsonl.
          steps: at which the run ends.
          restored_step: the step that the run goes on from, 0 at its start.
          tensorboard: the folder for TensorBoard, or None for none.
          console: where people read; standard output by default. A terminal gets a progress bar.
        """
        console = console or Console()
        cut_back(metrics, restored_step)
        self._lines = JsonLines(metrics)
        self._tensorboard = None
        if tensorboard is not None and is_local(tensorboard):  # its files are appended to
            from tensorboardX import SummaryWriter  # half a second, and not always wanted

            self._tensorboard = SummaryWriter(str(tensorboard), purge_step=restored_step + 1)
        self._display = (_Bar if console.is_terminal else _Lines)(console, steps, restored_step)

    def advance(self, step: int) -> None:
        """Says that `step` is done; cheap enough for each one."""
        self._display.advance(step)

    def log(self, metrics: Mapping[str, Any], histograms: Mapping[str, np.ndarray] | None = None) -> None:
        """Logs one step everywhere.

        Args:
          metrics: scalars, all of `FIELDS` among them. A number that is not finite is written as null.
          histograms: arrays by name, for TensorBoard alone.

        Raises:
          UserError: the file cannot be written, for one because the disk is full.
        """
        missing = [field for field in FIELDS if field not in metrics]
        if missing:
            raise ValueError(f"metrics lack {', '.join(missing)}")
        names = [*FIELDS, *(name for name in metrics if name not in FIELDS)]
        values = {name: plain(metrics[name]) for name in names}
        try:
            self._lines.append(values)
        except OSError as error:
            raise UserError(f"{self._lines.path} cannot be written: {error.strerror}.") from error
        if self._tensorboard is not None:
            self._log_tensorboard(values, histograms or {})
        self._display.log(values)

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._display.say(text)

    def close(self) -> None:
        """Ends the bar and closes the files."""
        self._display.close()
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _log_tensorboard(self, values: Mapping[str, Any], histograms: Mapping[str, np.ndarray]) -> None:
        step = values["step"]
        for name, value in values.items():
            if name not in ("step", "batch_hash") and value is not None:
                self._tensorboard.add_scalar(name, value, step)
        for name, array in histograms.items():
            self._tensorboard.add_histogram(name, np.asarray(array), step)


class Silence:
    """The reports of a process that another one speaks for."""

    def advance(self, step: int) -> None: ...

    def log(self, metrics: Mapping[str, Any], histograms: Mapping[str, np.ndarray] | None = None) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: Any) -> None: ...


def cut_back(path: epath.PathLike, step: int) -> None:
    """Rewrites metrics.jsonl at `path`, if it is there, without the lines after `step` and without torn ones."""

    def keep(line: Mapping[str, Any]) -> bool:
        return isinstance(line.get("step"), int) and line["step"] <= step

    cut_lines(path, keep)


def plain(value: Any) -> Any:
    """A scalar of Python, NumPy or JAX as JSON has it: float32 exactly, NaN and infinities as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


class _Lines:
    """One line a logged step, for logs that are read as files."""

    def __init__(self, console: Console, steps: int, restored_step: int):
        self._console, self._steps = console, steps
        self._begin: tuple[int, float] | None = None  # the first step's end: compilation tells nothing of what is left

    def advance(self, step: int) -> None:
        if self._begin is None:
            self._begin = step, time.monotonic()

    def log(self, values: Mapping[str, Any]) -> None:
        step = values["step"]
        self.say(
            f"step {step}/{self._steps}  loss {_number(values['loss'], '.4f')}  "
            f"{_number(values['tokens_per_second'], ',.0f')} tokens/s  {self._time_left(step)} left"
        )

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        pass

    def _time_left(self, step: int) -> str:
        if self._begin is None or step <= self._begin[0]:
            return "-:--:--"
        seconds_per_step = (time.monotonic() - self._begin[1]) / (step - self._begin[0])
        return str(timedelta(seconds=round((self._steps - step) * seconds_per_step)))


class _Bar:
    """A progress bar, for people at a terminal."""

    def __init__(self, console: Console, steps: int, restored_step: int):
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
            refresh_per_second=2,  # the cores are for training
            speed_estimate_period=600,
        )
        self._task = self._progress.add_task("", total=steps, completed=restored_step, loss="?", rate="?")
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def log(self, values: Mapping[str, Any]) -> None:
        loss, rate = _number(values["loss"], ".4f"), _number(values["tokens_per_second"], ",.0f")
        self._progress.update(self._task, loss=loss, rate=rate)

    def say(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()
