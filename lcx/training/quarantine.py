"""What a run keeps away from: the documents of steps that were skipped, and the data that it steps over.

    quarantine.jsonl   for people: each skipped step with its loss, the limits it broke, and the documents of its batch
    rewinds.json       for the run: what it steps over, and since which step

A rewind is a transaction. What is to be stepped over is written first, with the word that newer checkpoints have to go;
then they go; then the word is taken back. A kill in between leaves the rest for the next start. All processes come to
it after the same step, since they see the same metrics; the first one writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from etils import epath

from lcx.errors import RunFailed, UserError
from lcx.files import JsonLines, read_json, read_lines, write_json
from lcx.parallel import processes
from lcx.training.checkpointing import Checkpoints

DocumentsOf = Callable[[int], list[dict[str, Any]]]


class BadStreak(Exception):
    """So many steps in a row were bad that the run has to rewind."""

    def __init__(self, steps: list[int], indices: list[int]):
        """steps: [first, last] of the streak. indices: [start, stop) of data."""
        super().__init__(steps, indices)
        self.steps, self.indices = steps, indices


@dataclass(frozen=True)
class Quarantine:
    """The two files of a run's workdir."""

    folder: epath.Path
    documents: DocumentsOf  # the documents of a data index, as JSON has them
    say: Callable[[str], None] = print

    def intervals(self) -> list[list[int]]:
        """The data indices that the run steps over, as [start, stop); the same on all processes."""
        return processes.on_first(lambda: [record["indices"] for record in self._read()["rewinds"]])

    def record(self, step: int, data_index: int, why: dict[str, Any]) -> None:
        """Writes down a skipped step, unless its data index is there already: from before a kill or a rewind.

        why: numbers by name; what is not finite as None. Raises UserError where it cannot be written.
        """
        if not processes.is_first():
            return
        path = self.folder / "quarantine.jsonl"
        try:
            if any(line.get("data_index") == data_index for line in read_lines(path)):
                return
            lines = JsonLines(path)
            lines.append({"data_index": data_index, "step": step, **why, "rows": self.documents(data_index)}, True)
            lines.close()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def rewind(self, streak: BadStreak, checkpoints: Checkpoints, most: int) -> None:
        """Makes the checkpoint before the streak the newest, and the streak's data indices ones that are stepped over.

        Raises RunFailed, with the report written, where the run has rewound `most` times.
        """
        checkpoints.wait()
        processes.on_first(lambda: self._begin(streak, most))
        self.finish(checkpoints)

    def finish(self, checkpoints: Checkpoints) -> None:
        """Removes what a rewind has given up, if that was not done; to be called before anything is restored."""
        processes.on_first(lambda: self._finish(checkpoints))

    def _begin(self, streak: BadStreak, most: int) -> None:
        rewinds = self._read()["rewinds"]
        first, last = streak.steps
        start, stop = streak.indices
        if len(rewinds) >= most:
            bad = [line for line in read_lines(self.folder / "quarantine.jsonl")]
            write_json(self.folder / "failure.json", {"steps": streak.steps, "rewinds": rewinds, "skipped": bad})
            raise RunFailed(
                f"steps {first} to {last} were all bad, after {len(rewinds)} rewinds, and the run gives up: "
                f"{self.folder / 'failure.json'} tells what was skipped; look at those documents, lower the learning "
                "rate, or raise health.max_rewinds or health.threshold, and give the same command again."
            )
        record = {"steps": streak.steps, "indices": streak.indices}
        self._write({"rewinds": [*rewinds, record], "remove_after": first - 1})
        self.say(
            f"Steps {first} to {last} were all bad: the run goes back to before them and steps over data indices "
            f"{start} to {stop - 1}."
        )

    def _finish(self, checkpoints: Checkpoints) -> None:
        values = self._read()
        if "remove_after" in values:
            checkpoints.remove_after(values.pop("remove_after"))
            self._write(values)

    def _read(self) -> dict[str, Any]:
        path = self.folder / "rewinds.json"
        if not path.exists():
            return {"rewinds": []}
        values = read_json(path)
        rewinds, after = values.get("rewinds"), values.get("remove_after", 0)
        whole = isinstance(rewinds, list) and isinstance(after, int) and all(map(_is_rewind, rewinds))
        if not whole:
            raise UserError(f"{path} is damaged: it does not say what the run steps over; take it from a backup.")
        return values

    def _write(self, values: dict[str, Any]) -> None:
        try:
            write_json(self.folder / "rewinds.json", values)
        except OSError as error:
            raise UserError(f"{self.folder / 'rewinds.json'} cannot be written: {error.strerror}.") from error


def _is_rewind(record: Any) -> bool:
    """Whether it is a record of `Quarantine.rewind`."""
    indices = record.get("indices") if isinstance(record, dict) else None
    return isinstance(indices, list) and len(indices) == 2 and all(isinstance(i, int) for i in indices)
