"""From files as people have them to prepared data: the work behind `lcx prepare_data`.

The files are divided into jobs, each of which makes one shard of training documents and one of held-out documents, and
writes down what it made when it is whole. A killed run is gone on with by the same command: only jobs without such a
record are done. What is made depends on the input alone, not on the number of processes.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from lcx.config import SourceConfig
from lcx.data import store
from lcx.data.readers import FORMATS, Job, check_format, format_of, list_files, read_job, split_job
from lcx.data.sources import HELDOUT_SHARE
from lcx.data.tokenizers import load_tokenizer
from lcx.data.worker_processes import end_with_parent
from lcx.errors import UserError
from lcx.files import read_json, write_json

JOB_BYTES = 2**27
PLAN = "prepare.json"  # what is being made, as long as it is not whole


class Task(NamedTuple):
    """What a worker is given."""

    number: int
    jobs: tuple[Job, ...]
    source: dict[str, Any]
    tokenizer: str
    start_token: int | None
    heldout_share: int
    out: str


class Progress(NamedTuple):
    """What is done."""

    done: int  # tasks
    tasks: int
    bytes_read: int  # of the source, by the tasks that this run did or found done
    total_bytes: int
    documents: int
    tokens: int


def prepare(
    source: SourceConfig,
    out: Path,
    tokenizer: str = "bytes",
    start_token: int | None = None,
    workers: int = 1,
    job_bytes: int = JOB_BYTES,
    heldout_share: int = HELDOUT_SHARE,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Writes the tokens of a source's documents as shards into the folder `out`, and returns its manifest.

    A document is held out where the sha256 of its content is divisible by `heldout_share` (0: none is), so that copies
    of it are, too. Raises UserError: what cannot be read, another preparation's folder.
    """
    check_format(source)
    loaded = load_tokenizer(tokenizer, start_token)
    groups = _divide(source, job_bytes)
    total = sum(job.size for jobs in groups for job in jobs)
    plan = {
        "kind": store.KIND,
        "source": {"path": source.path, "format": source.format, "options": source.to_dict()["options"]},
        "tokenizer": {"name": tokenizer, "start_token": start_token, "fingerprint": loaded.fingerprint},
        "dtype": str(store.token_dtype(loaded.vocab_size).__name__),
        "masked": _is_masked(source, groups),
        "heldout_share": heldout_share,
        "files": _fingerprint(groups),
    }
    finished = _begin(out, plan)
    if finished is not None:
        return finished
    tasks = [
        Task(number, tuple(jobs), source.to_dict(), tokenizer, start_token, heldout_share, os.fspath(out))
        for number, jobs in enumerate(groups)
    ]
    records: dict[int, dict[str, Any]] = {}
    sizes = [sum(job.size for job in jobs) for jobs in groups]

    def add(number: int, record: dict[str, Any]) -> None:
        records[number] = record
        shards = [shard for record in records.values() for shard in record["shards"]]
        documents, tokens = (sum(shard[name] for shard in shards) for name in ("documents", "tokens"))
        report(Progress(len(records), len(tasks), sum(sizes[i] for i in records), total, documents, tokens))

    for task in tasks:
        record = _finished_record(out, task.number)
        if record is not None:
            add(task.number, record)
    waiting = [task for task in tasks if task.number not in records]
    for number, record in _run(waiting, plan["masked"], workers):
        add(number, record)
    shards = [shard for number in sorted(records) for shard in records[number]["shards"] if shard["documents"]]
    if not any(shard["split"] == "train" for shard in shards):
        raise UserError(f"there is no document with text to train on in {source.path}.")
    manifest = plan | {"shards": shards}
    write_json(out / store.MANIFEST, manifest)
    for number in range(len(tasks)):
        _record_file(out, number).unlink()
    (out / PLAN).unlink()
    return manifest


def _divide(source: SourceConfig, job_bytes: int) -> list[list[Job]]:
    """The source's files in groups of about `job_bytes`; large files in parts where that is possible."""
    groups: list[list[Job]] = []
    size = job_bytes
    for job in list_files(source):
        kind = source.format if source.format != "auto" else format_of(job.file)
        for part in split_job(job, kind, job_bytes):
            if size >= job_bytes:
                groups.append([])
                size = 0
            groups[-1].append(part)
            size += part.size
    if not groups:
        raise UserError(f"there is no file in {source.path} to prepare.")
    return groups


def _fingerprint(groups: list[list[Job]]) -> str:
    """Changes with any file's name, size or time of change, and with how the work is divided."""
    listed = [
        [[job.name, job.size, job.start, job.stop, job.file.stat().st_mtime_ns] for job in jobs] for jobs in groups
    ]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _is_masked(source: SourceConfig, groups: list[list[Job]]) -> bool:
    """Whether any document of a table's beginning has text that does not count: 256 records decide for all."""
    for jobs in groups[:1]:
        for job in jobs[:16]:
            kind = source.format if source.format != "auto" else format_of(job.file)
            if FORMATS[kind].suffixes:
                for _, record in zip(range(256), read_job(source, job), strict=False):
                    if not all(counts for _, counts in record.pieces):
                        return True
    return False


def _begin(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Makes the folder, or finds one where the same was begun; the manifest where it is finished. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (store.MANIFEST, PLAN):
            if (out / name).exists():
                there = read_json(out / name)
                for key, value in plan.items():
                    if there.get(key) != json.loads(json.dumps(value)):
                        raise UserError(
                            f"{out} holds other data: its {key} is {json.dumps(there.get(key))}, not "
                            f"{json.dumps(value)}; use another --out."
                        )
                return there if name == store.MANIFEST else None
        if any(path.name[0] != "." for path in out.iterdir()):
            raise UserError(f"{out} is not empty, and holds no prepared data; use another --out.")
        write_json(out / PLAN, plan)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; use another --out.") from None
    return None


def _record_file(out: Path, number: int) -> Path:
    return out / f"shard-{number:05}.json"


def _finished_record(out: Path, number: int) -> dict[str, Any] | None:
    """What a task that is done wrote of itself, if its files are all there."""
    try:
        record = read_json(_record_file(out, number))
        files = {name: entry for shard in record["shards"] for name, entry in shard["files"].items()}
        whole = all((out / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, UserError, KeyError):
        return None
    return record if whole else None


def _run(tasks: list[Task], masked: bool, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Does the tasks, in this process or in others, and yields each one's record as it ends."""
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task.number, _do(task, masked)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=end_with_parent) as pool:
        try:
            futures = {pool.submit(_do, task, masked): task.number for task in tasks}

            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was ended from outside, perhaps for want of memory; give the same command again, "
                "with fewer --workers."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _do(task: Task, masked: bool) -> dict[str, Any]:
    """Makes the shards of a task and its record."""
    source, out = SourceConfig.from_dict(task.source), Path(task.out)
    tokenizer = load_tokenizer(task.tokenizer, task.start_token)
    dtype = store.token_dtype(tokenizer.vocab_size)
    names = {split: f"{split}-{task.number:05}" for split in ("train", "heldout")}
    writers = {split: store.ShardWriter(out, name, dtype, masked) for split, name in names.items()}
    for job in task.jobs:
        for record in read_job(source, job):
            tokens, scored = store.encode(record, tokenizer)
            if not tokens.size:
                continue
            if scored is not None and not masked:
                raise UserError(
                    f"{record.name} has text that does not count in the loss, and the first 256 documents have none: "
                    "put such documents first, or prepare them by themselves."
                )
            held = task.heldout_share and int.from_bytes(record.digest()) % task.heldout_share == 0
            try:
                writers["heldout" if held else "train"].write(tokens, scored)
            except UserError as error:
                raise UserError(f"{record.name}: {error}") from None
    shards = [{"name": names[split], "split": split, **writer.close()} for split, writer in writers.items()]
    for shard in shards:
        if not shard["documents"]:
            for name in shard["files"]:
                (out / name).unlink()
            shard["files"] = {}
    record = {"shards": shards}
    write_json(_record_file(out, task.number), record)
    return record
