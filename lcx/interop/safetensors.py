"""Weights in safetensors files: written tensor after tensor, read piece by piece.

The `safetensors` library reads; it cannot write what does not fit into memory, so the writer is ours. A file is the
length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor) and the tensors.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from lcx.errors import UserError
from lcx.files import is_file_name
from lcx.interop.tables import Shape

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write(
    folder: epath.Path,
    tensors: Mapping[str, Shape],
    values: Callable[[str], np.ndarray],
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes tensors into one file, or several with an index where they have more than shard_bytes together.

    Args:
      folder: there.
      tensors: shapes by name, in the order of the files.
      values: gives a tensor when it is its turn; no two are held at a time.
      dtype: of the files, a name of DTYPES.
      shard_bytes: of a file, at most; a larger tensor has a file to itself.

    Raises ValueError for a value of another shape.
    """
    kind = DTYPES[dtype]
    sizes = {name: math.prod(shape) * kind.itemsize for name, shape in tensors.items()}
    shards = _shards(sizes, shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header({name: tensors[name] for name in names}, sizes, _NAMES[dtype]))
            for name in names:
                out.write(_bytes(name, values(name), tensors[name], kind))
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(name: str, array: np.ndarray, shape: Shape, kind: np.dtype) -> memoryview:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, not {shape}")
    return memoryview(np.ascontiguousarray(array).astype(kind, copy=False).reshape(-1).view(np.uint8))


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(tensors: Mapping[str, Shape], sizes: Mapping[str, int], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + sizes[name]]}
        place += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Reader:
    """The tensors of a folder of safetensors files; nothing is read, or held, but what is asked for."""

    def __init__(self, folder: epath.PathLike):
        """Reads the headers. Raises UserError where there are none, or a file is missing or damaged."""
        self.folder = epath.Path(folder)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: set[str] = set()  # in the words of the format: "F32"
        self._files: dict[str, str] = {}
        for file in _files(self.folder):
            try:
                with self._open(file) as handle:
                    for name in handle.keys():
                        part = handle.get_slice(name)
                        self._files[name], self.shapes[name] = file, tuple(part.get_shape())
                        self.dtypes.add(part.get_dtype())
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{self.folder / file} cannot be read: {error}.") from None

    def _open(self, file: str) -> Any:
        """The file, mapped while it is read: what stays mapped would count as memory of this process."""
        return safetensors.safe_open(self.folder / file, framework="np")

    def rows(self, name: str, start: int, count: int) -> np.ndarray:
        """Some of a tensor's rows."""
        with self._open(self._files[name]) as handle:
            return handle.get_slice(name)[start : start + count]

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor."""
        with self._open(self._files[name]) as handle:
            return handle.get_tensor(name)


def checksum(array: np.ndarray) -> str:
    """The sha256 of an array's bytes."""
    return hashlib.sha256(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))).hexdigest()


def _files(folder: epath.Path) -> list[str]:
    if (folder / SINGLE).exists():
        return [SINGLE]
    if (folder / INDEX).exists():
        try:
            files = list(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{folder / INDEX} is damaged: it is not an index of safetensors files.") from None
        for file in files:
            if not is_file_name(file):
                raise UserError(f"{folder / INDEX} names {file!r}, which is no file of its folder.")
        return sorted(set(files))
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    hint = f" (lcx does not read {others[0]}: save the model as safetensors)" if others else ""
    raise UserError(f"{folder} has no {SINGLE} and no {INDEX}{hint}.")
