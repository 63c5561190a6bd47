"""What suites are made of: the run's tokenizer, its held-out text or files, and synthetic tasks."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx import data
from lcx.config import Config, DataConfig, SourceConfig
from lcx.data.synthetic import Example, Task, make_task, score
from lcx.errors import UserError
from lcx.evaluation.suite import Material


def make_material(config: Config, tokenizer: data.Tokenizer | None = None) -> Material:
    """Material for a run's config. tokenizer: another one than the config names, an export's for one."""
    data_config = config.data
    tokenizer = tokenizer or data.load_tokenizer(data_config.tokenizer, data_config.start_token)
    return Material(
        tokenizer=tokenizer,
        train_length=config.train.sequence_length,
        documents=functools.cache(lambda files: read_files(files, tokenizer) if files else held_out(config)),
        examples=lambda task, options, count: examples(task, options, count, tokenizer),
        score=score,
        chunk_size=config.evaluation.chunk_size,
        batch_size=config.evaluation.batch_size,
    )


def held_out(config: Config) -> list[np.ndarray]:
    """The held-out documents of a run's sources, those of synthetic tasks left out; int32 [tokens] each."""
    parts = data.training_corpus(config).parts
    return [
        np.asarray(part.heldout.tokens[start:stop], np.int32)
        for part in parts
        if not isinstance(part.train, Task)
        for start, stop in zip(part.heldout.offsets[:-1].tolist(), part.heldout.offsets[1:].tolist(), strict=True)
    ]


def read_files(files: str, tokenizer: data.Tokenizer) -> list[np.ndarray]:
    """The documents of a file or folder, in any format that sources have. Raises UserError."""
    from lcx.data.readers import read_source

    records = read_source(SourceConfig(name="files", path=files))
    found = [tokenizer.encode(b"".join(_bytes(text) for text, _ in record.pieces)) for record in records]
    if not found:
        raise UserError(f"{files} holds no text.")
    return found


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


def examples(task: str, options: Mapping[str, Any], count: int, tokenizer: data.Tokenizer) -> list[Example]:
    """Held-out examples of a synthetic task, the first `count` of them. Raises UserError."""
    source = SourceConfig(name=task, path=task, format="synthetic", options=dict(options))
    made = make_task(source, tokenizer)
    return [made.example(index, heldout=True) for index in range(count)]


def config_of_export(tokenizer_path: str, start_token: int | None, train_length: int) -> Config:
    """A config for suites on an export, which has none of its own: the embedded text, and its tokenizer."""
    base = Config()
    return Config.from_dict(
        base.to_dict()
        | {"data": DataConfig(tokenizer=tokenizer_path, start_token=start_token).to_dict()}
        | {"train": base.train.to_dict() | {"sequence_length": train_length}}
    )
