"""Tokens that other programs wrote: .bin (raw integers, or with llm.c's header) and .npy, read where they lie."""

import bisect
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lcx.config import SourceConfig
from lcx.data.documents import Chosen, Documents, choose
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError
from lcx.schema import build, limited

SUFFIXES = (".bin", ".npy")
LLM_C = 20240520  # the first of the 256 int32 of the header that llm.c writes
CHUNK = 2**24  # tokens looked at at one time


@dataclass(frozen=True)
class TokenOptions:
    """What the file does not say of itself."""

    dtype: Literal["uint8", "uint16", "uint32", "int32"] = "uint16"  # of a .bin without header
    separator: int | None = limited(None, minimum=0)  # the token that ends each document, or begins it
    separator_begins: bool = False  # it begins the document


def is_token_file(path: Path) -> bool:
    """Whether "auto" takes this for tokens: such a file, or a folder that holds nothing else."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.name[0] != "."]
        return bool(files) and all(file.suffix in SUFFIXES for file in files)
    return path.suffix in SUFFIXES and path.is_file()


def load(source: SourceConfig, tokenizer: Tokenizer, heldout_share: int) -> tuple[Chosen, Chosen, str]:
    """(what is trained on, what is held out, fingerprint) of the token files of a source.

    Without a separator a file is one document. Every `heldout_share`-th document is held out, the last one first; a
    file of fewer holds nothing out.

    Raises UserError for a file that is missing, of another kind, or holds tokens that the tokenizer does not have.
    """
    options = build(TokenOptions, dict(source.options), f'data.sources "{source.name}" options')
    path = Path(source.path).expanduser()
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f'data.sources "{source.name}": there is no file or folder of token files {source.path}.')
    arrays = [_open(file, options) for file in files]
    borders, names, fingerprint = [0], [], hashlib.sha256(f"{tokenizer.fingerprint} {options}".encode())
    for file, array in zip(files, arrays, strict=True):
        ends = _ends(file, array, options, tokenizer, fingerprint)
        names += [f"{file.name}:{i}" for i in range(1, len(ends) + 1)]
        borders += (borders[-1] + ends).tolist()
    everything = Documents(_EndToEnd(arrays), np.array(borders, np.int64), names)
    held = np.arange(len(names), 0, -1) % heldout_share == 0
    train, heldout = (choose(everything, np.flatnonzero(held == wanted)) for wanted in (False, True))
    return train, heldout, fingerprint.hexdigest()


def _open(file: Path, options: TokenOptions) -> np.ndarray:
    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r")
        else:
            header = np.fromfile(file, np.int32, 256)
            is_llm_c = header.size == 256 and header[0] == LLM_C
            offset, dtype = (1024, "uint16") if is_llm_c else (0, options.dtype)
            if (file.stat().st_size - offset) % np.dtype(dtype).itemsize:
                raise ValueError(f"its size is no multiple of {dtype}'s {np.dtype(dtype).itemsize} bytes")
            array = np.memmap(file, dtype, "r", offset)
            if is_llm_c and array.size != header[2]:
                raise ValueError(f"its header says {header[2]} tokens and it holds {array.size}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a file of tokens: {error}.") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise UserError(f"{file} is not a file of tokens: it holds {array.dtype}{list(array.shape)}.")
    return array


def _ends(file: Path, array: np.ndarray, options: TokenOptions, tokenizer: Tokenizer, fingerprint) -> np.ndarray:
    """Where each document of a file ends; checks and fingerprints all tokens on the way."""
    found = []
    for first in range(0, array.size, CHUNK):
        chunk = np.asarray(array[first : first + CHUNK])
        if int(chunk.max()) >= tokenizer.vocab_size or int(chunk.min()) < 0:
            bad = int(chunk.max()) if int(chunk.max()) >= tokenizer.vocab_size else int(chunk.min())
            raise UserError(
                f"{file} holds the token {bad}, but the tokenizer has {tokenizer.vocab_size}: set data.tokenizer to "
                "the one that it was written with, or options.dtype to the file's."
            )
        fingerprint.update(chunk.astype("<i4").tobytes())
        if options.separator is not None:
            shift = 0 if options.separator_begins else 1
            found.append(first + shift + np.flatnonzero(chunk == options.separator))
    ends = np.concatenate([*found, [array.size]]).astype(np.int64)
    return np.unique(ends[ends > 0])


class _EndToEnd:
    """Arrays one after the other, of which slices within one can be taken."""

    def __init__(self, arrays: list[np.ndarray]):
        self._arrays, self.dtype = arrays, arrays[0].dtype
        self._starts = np.cumsum([0, *(array.size for array in arrays)]).tolist()

    def __getitem__(self, where: slice) -> np.ndarray:
        at = bisect.bisect_right(self._starts, where.start) - 1
        return self._arrays[at][where.start - self._starts[at] : where.stop - self._starts[at]]
