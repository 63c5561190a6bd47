"""Files as people have them: text, source code, JSONL, Parquet and Arrow, compressed or not, read as records.

A record is one document as pieces of text, each of which counts in the loss or does not. JSONL, Parquet and Arrow hold
a record a line or row, in one of three shapes:

    {"text": "..."}                                              all of it counts
    {"prompt": "...", "completion": "..."}                       the completion counts
    {"pieces": [{"text": "...", "loss": false}, {"text": "...", "loss": true}]}
"""

import gzip
import hashlib
import importlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lcx.config import SourceConfig
from lcx.errors import UserError, suggest
from lcx.schema import build

STANDARD_LIBRARY = "stdlib"
SKIPPED = {"node_modules", "site-packages", "__pycache__"}  # folders of other people's or generated code


class Record(NamedTuple):
    """One document."""

    name: str
    pieces: tuple[tuple[bytes, bool], ...]
    """(text, whether it counts in the loss), in order."""

    def digest(self) -> bytes:
        """sha256 of the text, and of what counts where not all does."""
        if len(self.pieces) == 1 and self.pieces[0][1]:
            return hashlib.sha256(self.pieces[0][0]).digest()
        return hashlib.sha256(repr(self.pieces).encode()).digest()


class Job(NamedTuple):
    """A file to be read, or a part of it."""

    name: str  # POSIX path relative to the source
    file: Path
    size: int  # bytes on the disk
    start: int = 0
    stop: int | None = None  # of a part, by byte (JSONL) or row group (Parquet); None: up to the end


@dataclass(frozen=True)
class TextOptions:
    """A file is a document: nothing to choose."""


@dataclass(frozen=True)
class TableOptions:
    """A line or a row is a document."""

    column: str = "text"  # where its text is


def _read_text(job: Job, options: TextOptions) -> Iterator[Record]:
    with _open(job.file) as file:
        yield Record(job.name, ((file.read(), True),))


def _read_code(job: Job, options: TextOptions) -> Iterator[Record]:
    """Leaves out what is no text: files with a zero byte, or not in UTF-8."""
    for record in _read_text(job, options):
        content = record.pieces[0][0]
        try:
            content.decode()
        except UnicodeDecodeError:
            return
        if b"\0" not in content:
            yield record


def _read_jsonl(job: Job, options: TableOptions) -> Iterator[Record]:
    with _open(job.file) as file:
        if job.start:  # a line belongs to the part that its first byte lies in
            file.seek(job.start - 1)
            file.readline()
        number = 0
        while (job.stop is None or file.tell() < job.stop) and (line := file.readline()):
            number += 1
            if not line.strip():
                continue
            where = f"{job.file}, line {number}" + (f" after byte {job.start}" if job.start else "")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a JSON object: {error}.") from error
            yield Record(f"{job.name}:{number}", _pieces(record, options.column, where))


def _read_parquet(job: Job, options: TableOptions) -> Iterator[Record]:
    parquet = _library("pyarrow.parquet", job.file)
    with _explaining(job.file):
        file = parquet.ParquetFile(job.file)
        columns = [name for name in _columns(options) if name in file.schema_arrow.names]
        stop = file.num_row_groups if job.stop is None else job.stop
        row = sum(file.metadata.row_group(i).num_rows for i in range(job.start))
        for batch in file.iter_batches(256, row_groups=range(job.start, stop), columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield Record(f"{job.name}:{row}", _pieces(record, options.column, f"{job.file}, row {row}"))


def _read_arrow(job: Job, options: TableOptions) -> Iterator[Record]:
    """Arrow's stream format, which `datasets.save_to_disk` writes, or its file format."""
    arrow = _library("pyarrow", job.file)
    with _explaining(job.file), arrow.memory_map(os.fspath(job.file)) as source:
        try:
            reader = arrow.ipc.open_stream(source)
            batches = iter(reader)
        except arrow.ArrowInvalid:
            source.seek(0)
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        columns = [name for name in _columns(options) if name in reader.schema.names]
        row = 0
        for batch in batches:
            for record in batch.select(columns).to_pylist():
                row += 1
                yield Record(f"{job.name}:{row}", _pieces(record, options.column, f"{job.file}, row {row}"))


class Format(NamedTuple):
    """How files of a kind are read."""

    read: Callable[[Job, Any], Iterator[Record]]
    Options: type
    suffixes: tuple[str, ...]  # by which "auto" knows it; in a folder of tables only these files are read


FORMATS = {
    "text": Format(_read_text, TextOptions, ()),
    "code": Format(_read_code, TextOptions, ()),
    "jsonl": Format(_read_jsonl, TableOptions, (".jsonl", ".ndjson")),
    "parquet": Format(_read_parquet, TableOptions, (".parquet",)),
    "arrow": Format(_read_arrow, TableOptions, (".arrow",)),
}
TABLES = ("arrow", "parquet")
COMPRESSED = (".gz", ".zst")


def read_source(source: SourceConfig) -> Iterator[Record]:
    """The documents of a source, sorted by file, empty ones left out.

    `path` is "stdlib" (the *.py files of the running Python's standard library), a file, or a folder, all of whose
    files are read but hidden ones. `format` is a name of FORMATS, or "auto": by each file's suffix. Raises UserError
    for an unknown format or option, a missing or unreadable file, or a record that holds no text.
    """
    check_format(source)
    for job in list_files(source):
        for record in read_job(source, job):
            if any(text for text, _ in record.pieces):
                yield record


def check_format(source: SourceConfig, others: tuple[str, ...] = ()) -> None:
    """Raises UserError for a format that is neither one of FORMATS nor of `others`."""
    known = ["auto", *FORMATS, *others]
    if source.format not in known:
        raise UserError(
            f'data.sources "{source.name}": unknown format "{source.format}": ' + suggest(source.format, known)
        )


def read_job(source: SourceConfig, job: Job) -> Iterator[Record]:
    """The documents of a file, or of a part of it."""
    kind = FORMATS[source.format if source.format != "auto" else format_of(job.file)]
    given = {name: value for name, value in source.options.items()}
    options = build(kind.Options, given, f'data.sources "{source.name}" options')
    try:
        yield from kind.read(job, options)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or str(error) or "it ends too early"
        raise UserError(f'data.sources "{source.name}": cannot read {job.file}: {why}.') from error


def format_of(file: Path) -> str:
    """The format of a file by its name."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in COMPRESSED]
    for name, kind in FORMATS.items():
        if suffixes and suffixes[-1] in kind.suffixes:
            return name
    return "text"


def list_files(source: SourceConfig) -> list[Job]:
    """The files of a source, sorted by their paths relative to it."""
    if source.path == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        return [job for job in _walk(root, skip={"site-packages"}) if job.name.endswith(".py")]
    path = Path(source.path).expanduser()
    if path.is_dir():
        skip = SKIPPED if source.format == "code" else set()
        jobs = [job for job in _walk(path, skip) if not any(part[0] == "." for part in job.name.split("/"))]
        for name in TABLES:
            chosen = [job for job in jobs if job.file.suffix in FORMATS[name].suffixes]
            if source.format == name or (source.format == "auto" and chosen):
                return chosen
        return jobs
    if path.is_file():
        return [Job(path.name, path, path.stat().st_size)]
    raise UserError(f'data.sources "{source.name}": there is no file or folder {source.path}.')


def split_job(job: Job, kind: str, most_bytes: int) -> list[Job]:
    """A file in parts of about `most_bytes` that can be read by themselves, where its format allows it."""
    if job.size <= most_bytes or kind not in ("jsonl", "parquet") or job.file.suffix in COMPRESSED:
        return [job]
    end = job.size
    if kind == "parquet":
        end = _library("pyarrow.parquet", job.file).ParquetFile(job.file).num_row_groups
    parts = min(end, -(-job.size // most_bytes))
    borders = [end * i // parts for i in range(parts + 1)]
    return [
        job._replace(size=job.size // parts, start=start, stop=stop)
        for start, stop in zip(borders, borders[1:], strict=False)
    ]


def _walk(root: Path, skip: set[str]) -> list[Job]:
    """All regular files under `root`, outside folders named in `skip`, sorted by POSIX path relative to it."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        found += [Path(folder, name) for name in files]
    jobs = (Job(file.relative_to(root).as_posix(), file, file.stat().st_size) for file in found if file.is_file())
    return sorted(jobs, key=lambda job: job.name)


def _pieces(record: Any, column: str, where: str) -> tuple[tuple[bytes, bool], ...]:
    """The pieces of a record, in one of the three shapes. A lone surrogate, which JSON can spell and UTF-8 cannot,
    becomes a question mark."""
    found: list[tuple[Any, Any]] = []
    if isinstance(record, Mapping):
        if isinstance(record.get(column), str | bytes):
            found = [(record[column], True)]
        elif "prompt" in record and "completion" in record:
            found = [(record["prompt"], False), (record["completion"], True)]
        elif isinstance(record.get("pieces"), list):
            found = [(piece.get("text"), piece.get("loss", True)) for piece in record["pieces"]]
    if not found or not all(isinstance(text, str | bytes) for text, _ in found):
        raise UserError(f'{where}: a record needs a field "{column}" that holds a string (or prompt and completion).')
    encode = lambda text: text if isinstance(text, bytes) else text.encode(errors="replace")  # noqa: E731
    return tuple((encode(text), bool(counts)) for text, counts in found)


def _columns(options: TableOptions) -> list[str]:
    return [options.column, "prompt", "completion", "pieces"]


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            yield file
    elif path.suffix == ".zst":
        zstandard = _library("zstandard", path)
        try:
            with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as r:
                yield io.BufferedReader(r, 2**20)
        except zstandard.ZstdError as error:
            raise OSError(f"not a whole zstd file ({error})") from error
    else:
        with open(path, "rb") as file:
            yield file


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{file} needs {package}: pip install 'lcx[data]', or pip install {package}.") from None


@contextmanager
def _explaining(file: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into an OSError; it derives most of that from ValueError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
