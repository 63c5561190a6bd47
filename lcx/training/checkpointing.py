"""Checkpoints: written beside the training, committed by a manifest, verified before they are used.

    checkpoints/500/                  what orbax writes, first as 500.orbax-checkpoint-tmp
    checkpoints/500.manifest.json     sha256 and size of each file in it, written last: without it nothing was saved

The order makes a kill at any moment harmless. A checkpoint comes: folder under a temporary name, rename, manifest. An
old one goes, only after the manifest of a new one: manifest, then folder. So whatever has no manifest is a remnant, and
the next start removes it. On object storage, which knows no rename, nothing but the manifest's one put decides.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.sharding import SingleDeviceSharding

from lcx.errors import SaveFailed, UserError
from lcx.files import is_local, read_json, sync, temporary_name, write_bytes, write_json
from lcx.parallel import processes
from lcx.params import path_name

Tree = Any  # a pytree of arrays
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
NICE = 10  # of the threads that write: a tenth of a core where steps take all of them
BYTES_PER_SECOND = 50e6  # at which a state is taken to be saved, before that was measured
# What a user can mend of a save that failed: the error, what it means, what to do.
MENDABLE = (
    (DISK_FULL, "the disk is full", "free some space"),
    (NOT_WRITABLE, "the workdir cannot be written any more", "make it writable"),
)
STEP = re.compile(r"\d+")
MANIFEST = re.compile(r"(\d+)\.manifest\.json")
REMNANT = re.compile(r"\d+\.orbax-checkpoint-tmp.*|" + temporary_name(MANIFEST.pattern))

# What fails in orbax's threads is raised by `wait`; orbax also logs it, several times, with tracebacks.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def _unraisable(hook: Callable, unraisable: Any) -> None:
    """Where one array cannot be written orbax closes its loop, and TensorStore's callbacks of the others print that."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


sys.unraisablehook = partial(_unraisable, sys.unraisablehook)


class Checkpoints:
    """The checkpoints of one run, in one folder that all of its processes see.

    Each process writes the arrays that its devices hold; the first one commits, removes and judges for all, so the
    methods are called by all of them in the same order.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int,
        say: Callable[[str], None] = print,
        keep_every: int = 0,
        keep_best: int = 0,
    ):
        """Cleans the folder of what a killed run left, then opens it.

        Args:
          folder: made where it is not there. No other run may use it.
          keep: how many of the newest checkpoints stay.
          say: is told, in one sentence, of a checkpoint that is damaged.
          keep_every: checkpoints of the multiples of so many steps stay as well; 0: none.
          keep_best: so many with the lowest score stay as well.
        """
        self._folder = _absolute(folder)
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._say = say
        self._slowest_save: float | None = None
        processes.on_first(self._open)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._saving: Future | None = None

    def steps(self) -> list[int]:
        """The steps whose checkpoints are committed, oldest first."""
        return _steps(self._folder)

    def latest(self) -> int | None:
        """The step of the newest committed checkpoint, if there is one."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Tree, score: float | None = None, in_streak: bool = False) -> None:
        """Starts to save `state` as the checkpoint of `step` and returns as soon as its arrays may be donated.

        Waits first until the save before it is committed, and raises what that one met (see `wait`). A step that has a
        checkpoint raises ValueError. Arrays of size 0 cannot be saved.

        score: what `keep_best` chooses by. in_streak: the steps before it were bad, so that the run may have to go back
        to the checkpoint before them, which stays.
        """
        self.wait()
        began = time.monotonic()
        with self._explaining(step):
            args = ocp.args.StandardSave(state, save_args=jax.tree.map(_storage, state))
            # In the thread, so that those that orbax starts give way to the step as well.
            self._thread.submit(self._orbax.save, self._folder / str(step), args=args).result()
        facts = {"in_streak": True} if in_streak else {}
        if score is not None and math.isfinite(score):
            facts["score"] = score
        self._saving = self._thread.submit(self._commit, step, began, facts)

    def seconds_to_save(self, state_bytes: int) -> float:
        """What a save takes, at most, as far as is known: of this process, else of the newest one's before it, else
        guessed from the size of the state."""
        if self._slowest_save is not None:
            return self._slowest_save
        for step in reversed(self.steps()):
            seconds = self._fact(step, "seconds")
            if isinstance(seconds, int | float):
                return float(seconds)
        return 5.0 + state_bytes / BYTES_PER_SECOND

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, which a rewind has given up; on the first process alone."""
        for later in self.steps():
            if later > step:
                self._remove(later)

    def wait(self) -> None:
        """Returns when everything is saved and committed.

        Raises UserError where the disk is full, else whatever the save met; older checkpoints are whole in both cases.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits, as `wait` does, and ends the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with suppress(Exception):  # what `wait` did not raise, it raised before
                self._orbax.close()

    def restore(self, abstract_state: Tree | Callable[[int], Tree]) -> tuple[int, Tree] | None:
        """The newest checkpoint that is whole, as (step, state); None where there is none.

        A damaged checkpoint is named, renamed to `<step>.damaged`, and the one before it is used.

        Args:
          abstract_state: the state as a pytree of `jax.ShapeDtypeStruct`s with shardings, onto which it is restored,
            from whatever mesh it was saved on; or the function that gives it for the `data_index` of the checkpoint.

        Raises:
          UserError: the checkpoint is another model's (structure, a shape or a dtype differ).
        """
        self.wait()
        step = processes.on_first(self._newest_whole)
        if step is None:
            return None
        if callable(abstract_state):
            abstract_state = abstract_state(data_index_of(self._folder, step))
        return step, _load(self._folder, step, abstract_state)

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        _remove_remnants(self._folder)

    def _newest_whole(self) -> int | None:
        """The step of the newest checkpoint that is whole; damaged ones before it are set aside."""
        for step in reversed(self.steps()):
            damage = _damage(self._folder, step)
            if damage is None:
                return step
            self._set_aside(step, damage)
        return None

    def _commit(self, step: int, began: float, facts: dict[str, Any]) -> None:
        """In the thread: waits for orbax, writes the manifest, then lets old checkpoints go."""
        with self._explaining(step):
            self._orbax.wait_until_finished()  # for all processes: orbax lets them wait for each other
            if not processes.is_first():
                return
            files = _files(self._folder / str(step))
            if is_local(self._folder):  # what the manifest states is on the disk before it
                for path in [*files.values(), *{path.parent for path in files.values()}]:
                    sync(path)
            fingerprints = {name: _fingerprint(path) for name, path in files.items()}
            seconds = time.monotonic() - began
            record = {"step": step, "files": fingerprints, "seconds": seconds, **facts}
            write_json(_manifest(self._folder, step), record | {"digest": manifest_digest(record)})
            self._slowest_save = max(self._slowest_save or 0.0, seconds)
            stay = self._staying()
            for old in self.steps():
                if old not in stay:
                    self._remove(old)

    def _staying(self) -> set[int]:
        """The steps whose checkpoints stay."""
        steps = self.steps()
        stay = set(steps[-self._keep :])
        sound = (step for step in reversed(steps) if not self._fact(step, "in_streak"))
        stay |= {next(sound, steps[-1])}
        if self._keep_every:
            stay |= {step for step in steps if step % self._keep_every == 0}
        if self._keep_best:
            scores = {step: self._fact(step, "score") for step in steps}
            scored = sorted((score, -step) for step, score in scores.items() if isinstance(score, int | float))
            stay |= {-step for _, step in scored[: self._keep_best]}
        return stay

    def _fact(self, step: int, name: str) -> Any:
        """What the manifest of a step says under a name, if it can be read and does."""
        try:
            return read_json(_manifest(self._folder, step)).get(name)
        except UserError:
            return None

    def _remove(self, step: int) -> None:
        _manifest(self._folder, step).unlink()
        if is_local(self._folder):
            sync(self._folder)  # the manifest is gone for good before the first file of the folder goes
        (self._folder / str(step)).rmtree()

    def _set_aside(self, step: int, damage: str) -> None:
        folder, aside = self._folder / str(step), self._folder / f"{step}.damaged"
        self._say(f"The checkpoint of step {step} is damaged ({damage}); it is set aside as {aside}.")
        if aside.exists():
            aside.rmtree()
        # The folder first: the other way round, a kill in between would leave a folder without manifest, to be removed.
        manifest, manifest_aside = _manifest(self._folder, step), self._folder / f"{step}.damaged.manifest.json"
        if is_local(self._folder):
            folder.rename(aside)
            manifest.replace(manifest_aside)
        else:  # the manifest last here: without it the folder would be a remnant
            for name, path in _files(folder).items():
                write_bytes(aside / name, path.read_bytes())
            write_bytes(manifest_aside, manifest.read_bytes())
            manifest.unlink()
            folder.rmtree()

    @contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        """Turns the error of a save into a UserError where it is the user's to mend."""
        try:
            yield
        except Exception as error:
            what = next((what for numbers, *what in MENDABLE if _is_of(error, numbers)), None)
            if what is None:
                raise
            # What orbax had not begun yet is dropped; Python would say so of each coroutine, after the sentence.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            latest = self.latest()
            kept = "no checkpoint was saved before" if latest is None else f"the checkpoint of step {latest} is whole"
            raise SaveFailed(
                f"{what[0]}: the checkpoint of step {step} could not be written to {self._folder}; {kept}: "
                f"{what[1]} and give the same command again."
            ) from error


def read_newest(
    folder: epath.PathLike, abstract_part: Tree, say: Callable[[str], None] = print
) -> tuple[int, Tree] | None:
    """A part of the newest whole checkpoint, as (step, part); changes nothing, so that it may be read as a run goes on.

    Args:
      folder: the checkpoints of a run; None is returned where it holds none that is whole.
      abstract_part: dicts, by the state's names, down to `jax.ShapeDtypeStruct`s with shardings:
        {"params": ...} reads the parameters alone.
      say: is told of each damaged checkpoint that is passed over.

    Raises:
      UserError: the checkpoint is another model's.
    """
    step = newest(folder, say)
    return None if step is None else (step, _load(_absolute(folder), step, abstract_part, partial=True))


def read_step(folder: epath.PathLike, step: int, abstract: Tree, partial: bool = False) -> Tree:
    """What `abstract` describes of the checkpoint of a step, all of it unless `partial`; changes nothing.

    Raises UserError where it is of another model. Whether it is whole, `check_whole` tells.
    """
    return _load(_absolute(folder), step, abstract, partial)


def check_whole(folder: epath.PathLike, step: int) -> None:
    """Raises UserError unless the step has a whole checkpoint."""
    folder = _absolute(folder)
    if step not in _steps(folder):
        steps = ", ".join(map(str, _steps(folder))) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; there are: {steps}.")
    if damage := _damage(folder, step):
        raise UserError(f"the checkpoint of step {step} in {folder} is damaged ({damage}); choose another step.")


def newest(folder: epath.PathLike, say: Callable[[str], None] = print) -> int | None:
    """The step of the newest whole checkpoint; None where there is none. `say` is told of those that are damaged."""
    folder = _absolute(folder)
    for step in reversed(_steps(folder)):
        damage = _damage(folder, step)
        if damage is None:
            return step
        say(f"The checkpoint of step {step} is damaged ({damage}); it is passed over.")
    return None


class ParameterReader:
    """Reads the parameters of one checkpoint, one layer of one of them at a time, from whatever mesh it was saved."""

    def __init__(self, folder: epath.PathLike, step: int, shapes: Tree):
        """Opens the checkpoint.

        Args:
          folder: the checkpoints of a run.
          step: which one.
          shapes: the parameters' tree, with a shape and a dtype in each leaf.

        Raises UserError where there is no such checkpoint, where it is damaged, or of another model; when it is read,
        also where it was removed meanwhile.
        """
        folder = _absolute(folder)
        check_whole(folder, step)
        _check_model(folder, step, {"params": shapes}, partial=True)
        self._base = os.fspath(folder / str(step))
        self._shapes = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}

    def __call__(self, path: str, index: int | None = None) -> np.ndarray:
        """The parameter at a path ("stack/layers/0_mamba/norm/scale"), or what stands at an index of its first axis."""
        name = ".".join(["params", *path.split("/")])
        base = self._base if "://" in self._base else f"file://{self._base}"
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
            found = (array if index is None else array[index]).read().result()
        except (ValueError, OSError) as error:
            raise UserError(
                f"{path} of checkpoint {self._base} cannot be read: it was removed meanwhile, or is damaged."
            ) from error
        return np.asarray(found).astype(self._shapes[path].dtype, copy=False)


def _give_way() -> None:
    """Lets a thread, and those that it starts, work while others do not: on a CPU they would slow the steps."""
    if sys.platform == "linux":  # where threads have priorities of their own
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


def _storage(leaf: Any) -> ocp.SaveArgs:
    """Matrices that are stacked over layers are stored by layer, so that one layer can be read by itself."""
    by_layer = np.ndim(leaf) >= 3 and leaf.nbytes >= 2**20
    return ocp.SaveArgs(shard_axes=(0,) if by_layer else ())


def _absolute(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder).absolute() if is_local(folder) else epath.Path(folder)


def manifest_digest(record: Mapping[str, Any]) -> str:
    """The sha256 of what a manifest says."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _manifest(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"{step}.manifest.json"


def _steps(folder: epath.Path) -> list[int]:
    """The steps that have a manifest, in order."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(match[1]) for name in names if (match := MANIFEST.fullmatch(name)))


def _damage(folder: epath.Path, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words."""
    try:
        manifest = read_json(_manifest(folder, step))
    except UserError:
        return "its manifest cannot be read"
    digest = manifest.pop("digest", None)
    stated, present = manifest.get("files"), _files(folder / str(step))
    if manifest.get("step") != step or not isinstance(stated, dict) or digest != manifest_digest(manifest):
        return "its manifest was changed, or is another one's"
    for name in sorted(stated.keys() | present.keys()):
        if name not in present:
            return f"{name} is missing"
        if name not in stated:
            return f"{name} does not belong to it"
        if _fingerprint(present[name]) != stated[name]:
            return f"{name} was changed"
    return None


def _load(folder: epath.Path, step: int, abstract: Tree, partial: bool = False) -> Tree:
    """What `abstract` describes of a checkpoint: all of it, unless `partial`."""
    _check_model(folder, step, abstract, partial)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)
        return reader.restore(folder / str(step), args=args)


def data_index_of(folder: epath.Path, step: int) -> int:
    """The index of the next batch, as the checkpoint of a run's step has it."""
    here = SingleDeviceSharding(jax.local_devices()[0])
    part = {"data_index": jax.ShapeDtypeStruct((), np.int32, sharding=here)}
    return int(_load(folder, step, part, partial=True)["data_index"])


def _check_model(folder: epath.Path, step: int, abstract: Tree, partial: bool) -> None:
    """Raises UserError where a checkpoint does not hold what `abstract` describes, or more, unless `partial`."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(folder / str(step)).item_metadata
    if metadata is None:
        raise UserError(
            f"the checkpoint of step {step} in {folder} has no metadata: it was removed meanwhile, or is damaged."
        )
    saved = ocp.tree.to_flat_dict(metadata.tree)
    wanted = ocp.tree.to_flat_dict(jax.tree.map(_stored, abstract))
    unwanted = [] if partial else [name for name in saved if name not in wanted]
    for name in [*wanted, *unwanted]:  # orbax would restore float32 as int32 without a word
        there, here = _describe(saved.get(name)), _describe(wanted.get(name))
        if there != here:
            what = {"opt_state": "optimizer", "health": "health.window or health.skip"}.get(name[0], "model")
            raise UserError(
                f"the checkpoint of step {step} in {folder} is of another {what}: {'/'.join(name)} is {there} there "
                f"and {here} here; use the config that it was trained with, or another workdir (which may begin with "
                "a part of it: checkpoint.fork, checkpoint.fork_state)."
            )


def _remove_remnants(folder: epath.Path) -> None:
    """Removes what a killed process left of saves and removals."""
    names = {path.name for path in folder.iterdir()}
    for name in names:
        manifest = MANIFEST.fullmatch(name)
        if REMNANT.fullmatch(name) or (STEP.fullmatch(name) and f"{name}.manifest.json" not in names):
            (folder / name).rmtree() if (folder / name).is_dir() else (folder / name).unlink()
        elif manifest and manifest[1] not in names:
            (folder / name).unlink()


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """The files below a folder by their relative paths."""
    files = {}
    for path in sorted(folder.iterdir()):
        below = _files(path) if path.is_dir() else {"": path}
        files |= {f"{path.name}/{name}".rstrip("/"): file for name, file in below.items()}
    return files


def _fingerprint(path: epath.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}


def _stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The array that orbax writes for a leaf: a random key's data, else the leaf."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _is_of(error: BaseException | None, numbers: Sequence[int]) -> bool:
    """Whether the error, or one behind it, has one of these numbers; TensorStore says so only in words."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(os.strerror(number) in str(error) for number in numbers) or _is_of(error.__cause__, numbers)
