"""Files written whole or not at all, and JSON that carries its `format_version`."""

import json
import os
from collections.abc import Mapping
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
