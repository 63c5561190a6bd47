"""The stages of a run: stretches of data indices with one sequence length, batch size, mixture and RoPE base each."""

import functools
import json
from dataclasses import dataclass, replace

from lcx.config import Config


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    number: int
    first_index: int  # data index
    first_row: int  # rows of all stages before
    config: Config  # of the stage alone: no stages, its lengths, its sources with their weights
    rope_base: float | None  # None: as the mixers have it


def stages(config: Config) -> tuple[Stage, ...]:
    """All stages of a run, in order; the first begins at index 0. What is before a first named stage is one, too."""
    return _stages(config.key)


def stage_at(config: Config, data_index: int) -> Stage:
    """The stage that a data index lies in."""
    return next(stage for stage in reversed(stages(config)) if stage.first_index <= data_index)


@functools.lru_cache(maxsize=16)
def _stages(key: str) -> tuple[Stage, ...]:
    config = Config.from_dict(json.loads(key))
    found = []
    records = config.train.stages
    if not records or records[0].step > 0:
        found.append(Stage(0, 0, 0, replace(config, train=replace(config.train, stages=())), None))
    for record in records:
        length = record.sequence_length or config.train.sequence_length
        batch_size = record.batch_size or config.train.batch_size
        train = replace(config.train, stages=(), sequence_length=length, batch_size=batch_size)
        sources = config.data.sources
        if record.weights is not None:
            sources = tuple(
                replace(source, weight=record.weights[source.name])
                for source in sources
                if record.weights.get(source.name)
            )
        first_row = 0
        if found:
            before = found[-1]
            first_row = before.first_row + (record.step - before.first_index) * before.config.train.batch_size
        here = replace(config, train=train, data=replace(config.data, sources=sources))
        found.append(Stage(len(found), record.step, first_row, here, record.rope_base))
    return tuple(found)
