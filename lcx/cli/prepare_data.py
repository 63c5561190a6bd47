"""`lcx prepare_data`: one's own corpus as token shards that any config can read."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lcx.cli.flags import Flag, parse

SUMMARY = """Turns text, JSONL (.gz, .zst), Parquet, Hugging Face datasets folders or source code into shards of tokens.
The same command goes on where it was killed. A config reads them by --config.data.sources[0].path=OUT."""
FLAGS = [
    Flag("input", "a file or a folder; stdlib is Python's standard library", required=True),
    Flag("out", "the folder for the shards", required=True),
    Flag("format", "auto (by the file names), text, code, jsonl, parquet or arrow", default="auto"),
    Flag("column", "of JSONL, Parquet and Arrow: the field that holds the text", default="text"),
    Flag("tokenizer", "bytes, or a tokenizers JSON file", default="bytes"),
    Flag("start_token", "a token that every document begins with, as data.start_token", kind=int),
    Flag("workers", "processes; 0: one a core", kind=int, default=0, limits={"lower_bound": 0}),
    Flag("shard_megabytes", "text that becomes one shard", kind=int, default=128, limits={"lower_bound": 1}),
    Flag("heldout", "one document in this many is held out; 0: none", kind=int, default=20, limits={"lower_bound": 0}),
]


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("prepare_data", SUMMARY, FLAGS, argv)
    from lcx.config import SourceConfig
    from lcx.data.prepare import prepare

    options = {} if values.column == "text" else {"column": values.column}
    source = SourceConfig(name="input", path=values.input, format=values.format, options=options)
    workers = values.workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0] * os.cpu_count()
    )
    console = Console()
    with _Display(console) as display:
        manifest = prepare(
            source,
            Path(values.out).expanduser(),
            values.tokenizer,
            values.start_token,
            workers,
            values.shard_megabytes * 2**20,
            values.heldout,
            display.report,
        )
    counts = {split: [s for s in manifest["shards"] if s["split"] == split] for split in ("train", "heldout")}
    for split, shards in counts.items():
        documents, tokens = (sum(shard[name] for shard in shards) for name in ("documents", "tokens"))
        print(f"{split}: {documents:,} documents, {tokens:,} tokens in {len(shards)} shards")
    print(f"to train on them: --config.data.sources[0].path={shlex.quote(values.out)}", flush=True)
    return 0


class _Display:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console):
        self._console, self._last = console, -1
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tokens]} tokens"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None

    def __enter__(self) -> "_Display":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("preparing", total=None, tokens="0")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def report(self, progress) -> None:
        if self._bar:
            done = dict(completed=progress.bytes_read, total=progress.total_bytes, tokens=f"{progress.tokens:,}")
            self._bar.update(self._task, **done)
            return
        tenth = 10 * progress.done // progress.tasks
        if tenth > self._last:
            self._last = tenth
            done = f"{progress.done} of {progress.tasks} parts, {progress.bytes_read / 1e6:,.1f} MB"
            print(f"{done}: {progress.documents:,} documents, {progress.tokens:,} tokens", flush=True)
