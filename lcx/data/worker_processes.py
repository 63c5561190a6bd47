"""Batches from worker processes. They share no memory, send batches through pipes, and end when their parent does."""

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait

import numpy as np

from lcx.config import Config
from lcx.stages import stage_at


def read_in_processes(
    config: Config, start_index: int, rows: Sequence[Sequence[int]] | None = None
) -> Generator[tuple[int, dict[str, np.ndarray]]]:
    """(data_index, batch) for data_index = start_index, start_index + 1, ... from data.worker_processes processes.

    rows: those that are wanted of each stage's batches; None: all.
    Worker k of n makes the batches k, k + n, ...; each is at most one batch ahead, since a pipe takes no whole one.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads in the middle of what they do
    count, workers = config.data.worker_processes, []
    try:
        for k in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(config.key, start_index + k, count, rows, sender), daemon=True
            )
            process.start()
            sender.close()
            workers.append((process, receiver))
        for index in itertools.count(start_index):
            process, receiver = workers[(index - start_index) % count]
            try:
                result = receiver.recv()
            except EOFError:
                process.join(5)
                raise RuntimeError(f"the worker process of batch {index} ended with code {process.exitcode}") from None
            if isinstance(result, Exception):
                raise result
            yield index, result
    finally:
        for process, receiver in workers:
            receiver.close()
            process.kill()
        for process, _ in workers:
            process.join()


def end_with_parent() -> None:
    """From here on this process, which `multiprocessing` started, ends as soon as its parent has, however that did."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _work(key: str, start_index: int, stride: int, rows: Sequence[Sequence[int]] | None, sender: Connection) -> None:
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent answers them, and then ends this process
        signal.signal(number, signal.SIG_IGN)
    from lcx.data.pipeline import batch

    config = Config.from_dict(json.loads(key))
    for index in itertools.count(start_index, stride):
        try:
            wanted = None if rows is None else rows[stage_at(config, index).number]
            result = batch(config, index, wanted)
        except Exception as error:
            result = error
        try:
            sender.send(result)
        except OSError:  # the reader was closed
            return
        if isinstance(result, Exception):
            return
