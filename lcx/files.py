"""Files written whole or not at all, and JSON that carries its `format_version`."""

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from lcx.errors import UserError

FORMAT_VERSION = 1


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Replaces the file at `path` by `data`: whoever reads it, at any moment or after a crash, sees the old or the new.

    Locally by a temporary file, fsync, rename and fsync of the folder; on object storage, where one put is atomic, by
    that. Folders above it are made. Raises OSError.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return
    temporary = path.parent / temporary_name(path.name)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: epath.PathLike, values: Mapping[str, Any]) -> None:
    """Writes {"format_version": 1, **values} atomically. Raises OSError, or ValueError where a number is not finite."""
    text = json.dumps({"format_version": FORMAT_VERSION, **values}, indent=2, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The values of a file that `write_json` wrote, without the format version.

    Raises UserError where the file is no JSON object or of another format version, OSError where it cannot be read.
    """
    try:
        values = json.loads(epath.Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{path} is damaged: it is not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object.")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version!r}; this version of lcx reads {FORMAT_VERSION}.")
    return values


def lock_file(path: os.PathLike, what: str) -> int:
    """The descriptor of a local file, made if need be, which this process alone holds until it closes it or ends.

    `lockf`, for `flock` would live on in an orphaned child; its price is that closing any other descriptor of the file
    frees the lock, so it is not to be opened twice. Raises UserError, about `what`, where another process holds it, and
    OSError where it cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"{what} is in use by process {owner}; use another --workdir.") from None
        raise
    return descriptor


class JsonLines:
    """A file of JSON objects, one a line, that only grows.

    Locally it is appended to. Object storage knows no appends: there the lines lie in numbered parts beside the path,
    `metrics.jsonl.00000` and so on, of which the last one is put again with each line. `read_lines` reads both.
    """

    PART = 256  # lines

    def __init__(self, path: epath.PathLike):
        """Opens the file, which need not exist yet. Raises OSError."""
        self.path = epath.Path(path)
        self._file, self._lines = None, []
        if is_local(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # a line is a write: nothing is left to fail at the end
        else:
            self._number = max((int(part.name[-5:]) for part in line_files(self.path)), default=-1) + 1

    def append(self, values: Mapping[str, Any], durably: bool = False) -> None:
        """Adds {"format_version": 1, **values}; `durably`: it survives a power loss, too.

        Raises OSError, or ValueError where a number is not finite.
        """
        text = json.dumps({"format_version": FORMAT_VERSION, **values}, allow_nan=False).encode() + b"\n"
        if self._file is not None:
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durably:
                os.fsync(self._file.fileno())
            return
        if len(self._lines) == self.PART:
            self._number, self._lines = self._number + 1, []
        self._lines.append(text)
        write_bytes(self.path.parent / f"{self.path.name}.{self._number:05}", b"".join(self._lines))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def line_files(path: epath.PathLike) -> list[epath.Path]:
    """The files that hold the lines of a `JsonLines`, in order: the file itself, or its parts."""
    path = epath.Path(path)
    if is_local(path) or not path.parent.exists():
        return [path] if path.exists() else []
    part = re.compile(re.escape(path.name) + r"\.\d{5}")
    return sorted((file for file in path.parent.iterdir() if part.fullmatch(file.name)), key=lambda file: file.name)


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of a `JsonLines`, which another process may be writing to. What is no whole line of it is left out:
    a kill, or a full disk, may have torn one. Raises OSError."""
    lines = (line for file in line_files(path) for line in file.read_bytes().splitlines(keepends=True))
    return [values for line in lines if (values := _line_values(line)) is not None]


def cut_lines(path: epath.PathLike, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a `JsonLines`, if it is there, without the lines that are not to be kept and without torn ones."""
    for file in reversed(line_files(path)):
        data = file.read_bytes()
        values = [(line, _line_values(line)) for line in data.splitlines(keepends=True)]
        kept = b"".join(line for line, value in values if value is not None and keep(value))
        if kept != data:
            write_bytes(file, kept)


def _line_values(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for any other bytes."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def is_file_name(name: Any) -> bool:
    """Whether it names a file in a folder, and cannot lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_local(path: epath.PathLike) -> bool:
    """Whether the path lies on a file system of this machine, not on object storage (`gs://...`)."""
    return "://" not in os.fspath(path)


def temporary_name(name: str) -> str:
    """The name under which a file lies while `write_bytes` writes it; a leftover of this name is never read."""
    return f".{name}.tmp"


def sync(path: epath.PathLike) -> None:
    """Makes a local file's data, or a local folder's names, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """Where this user keeps what can be made again: `name` in $XDG_CACHE_HOME/lcx, or in ~/.cache/lcx."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lcx" / name
