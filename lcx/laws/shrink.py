"""A config made small enough to be tried: the same pattern, options and mixers, narrower, shallower and shorter.

What is made smaller keeps its part: heads and channels divide over the mesh as before, query heads share key heads as
before, a wider window stays the wider one, and windows and segments reach over the border of a shard of time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from lcx.config import Config, remat_chunk
from lcx.errors import UserError
from lcx.mixers import Mixer, find_mixer
from lcx.mixers.attention import Attention
from lcx.mixers.heads import HeadOptions
from lcx.mixers.infini import Infini
from lcx.mixers.mamba import Mamba
from lcx.mixers.mamba2 import Mamba2
from lcx.mixers.mlp import MLP
from lcx.models.pattern import parse_pattern
from lcx.schema import build

Record = dict[str, Any]

SHARD = 4  # tokens of a row on a shard of time, at least
ROW = 16  # tokens of a row, at least
ROWS = 6  # of a batch, about
WIDTH = 32  # of the model, at least
LAYERS = 8  # longer patterns lose repeats
WINDOW, SEGMENT = 7, 5  # of the narrowest window, the shortest segment: odd, so that shards and chunks cut them


@dataclass(frozen=True)
class Scale:
    """What the mixers' options are fitted to."""

    d_model: int
    tensor: int
    windows: Mapping[int, int]  # the small window or segment for each of the config's
    segments: Mapping[int, int]


def shrink(config: Config, mesh: Mapping[str, int], fits: Callable[[Config], None]) -> Config:
    """The small config.

    Args:
      config: the whole one.
      mesh: the devices along each axis.
      fits: raises UserError for a config whose model cannot be built on the mesh. The narrowest model that fits is
        taken; options of mixers that are not lcx's stay as they are, and may ask for more.

    Raises UserError where not even the whole width fits.
    """
    *narrow, whole = _widths(config.model.d_model, mesh)
    for width in narrow:
        small = _shrunk(config, mesh, width)
        try:
            fits(small)
            return small
        except UserError:
            continue
    small = _shrunk(config, mesh, whole)
    fits(small)
    return small


def _shrunk(config: Config, mesh: Mapping[str, int], width: int) -> Config:
    model, train = config.model, config.train
    used = {name for names in parse_pattern(model.pattern, model.mixers) for name in names}
    options = {name: _options(record) for name, record in model.mixers.items() if name in used}
    scale = Scale(
        width,
        mesh["tensor"],
        _ranked([option.window for option in options.values() if isinstance(option, Attention.Options)], WINDOW),
        _ranked([option.segment_length for option in options.values() if isinstance(option, Infini.Options)], SEGMENT),
    )
    smaller = lambda name: _smaller(options[name], scale) if name in used else {}  # noqa: E731
    small_model = replace(
        model,
        pattern=without_repeats(model.pattern, model.mixers),
        mixers={name: dict(record) | smaller(name) for name, record in model.mixers.items()},
        remat={name: f"time:{SEGMENT}" if remat_chunk(policy) else policy for name, policy in model.remat.items()},
        periods=min(model.periods, 2),
        d_model=width,
        vocab_size=_multiple(mesh["tensor"], 61, model.vocab_size),
    )
    shards, accumulate = mesh["seq"], min(train.accumulate, 2)
    length = max(SHARD, -(-ROW // shards))
    length += length % 2 * (train.sequence_length // shards % 2 == 0)  # the ring is balanced where a shard is even
    places = mesh["data"] * mesh["fsdp"]
    small_train = replace(
        train,
        accumulate=accumulate,
        batch_size=places * accumulate * max(1, ROWS // places),
        sequence_length=length * shards,
        loss_chunk_size=(length - 1) * shards,  # does not divide a shard
    )
    return replace(config, model=small_model, train=small_train)


def _widths(d_model: int, mesh: Mapping[str, int]) -> Iterator[int]:
    """The divisors of the model's width that the mesh divides too, from WIDTH on; the last is the width itself."""
    step = math.lcm(mesh["fsdp"], mesh["tensor"])
    yield from (width for width in range(min(WIDTH, d_model), d_model) if not (d_model % width or width % step))
    yield d_model


def without_repeats(pattern: str, mixers: Mapping[str, Any]) -> str:
    """A pattern of more than LAYERS layers, with one of each run of equal stretches; others as they are."""
    layers = list(parse_pattern(pattern, mixers))
    size = 1
    while len(layers) > LAYERS and 2 * size <= len(layers):
        place = 0
        while place + 2 * size <= len(layers):
            if layers[place : place + size] == layers[place + size : place + 2 * size]:
                del layers[place : place + size]
            else:
                place += 1
        size += 1
    text = lambda names: names[0] if len(names) == 1 else f"parallel({', '.join(names)})"  # noqa: E731
    return " ".join(map(text, layers))


def _ranked(values: list, smallest: int) -> dict[int, int]:
    """Small numbers for the different ones among the values, in their order, none larger than its own."""
    found = sorted({value for value in values if value is not None})
    return {value: min(value, small) for value, small in zip(found, count(smallest, smallest - 1), strict=False)}


def _multiple(step: int, least: int, most: int) -> int:
    """The smallest multiple of `step` from `least` on, if that is below `most`; else `most`."""
    return min(most, -(-least // step) * step)


def _options(record: Mapping[str, Any]) -> Any:
    return build(find_mixer(record["type"]).Options, {name: record[name] for name in record if name != "type"})


def _smaller(options: Any, scale: Scale) -> Record:
    """The options that change. A user's mixer with the options of one of lcx's is made smaller like it."""
    return next((small(options, scale) for kind, small in SMALLER.items() if isinstance(options, kind.Options)), {})


def _heads(options: HeadOptions, scale: Scale) -> Record:
    """The ratio of query heads to key heads up to 4, and as few key heads as the mesh lets be, but two where it can."""
    kv_heads = options.num_kv_heads or options.num_heads
    few = scale.tensor if scale.tensor > 1 or kv_heads == 1 else 2
    small = few if kv_heads % few == 0 else kv_heads
    kept = {} if options.num_kv_heads is None else {"num_kv_heads": small}
    return kept | {
        "num_heads": small * min(options.num_heads // kv_heads, 4),
        "head_dim": min(options.head_dim or 8, 8),
    }


def _attention(options: Any, scale: Scale) -> Record:
    window = None if options.window is None else scale.windows[options.window]
    return _heads(options, scale) | {"window": window, "sink_tokens": min(options.sink_tokens, 3)}


def _infini(options: Any, scale: Scale) -> Record:
    return _heads(options, scale) | {"segment_length": scale.segments[options.segment_length]}


def _mlp(options: Any, scale: Scale) -> Record:
    return {"d_ff": _multiple(scale.tensor, 40, options.d_ff)}


def _mamba(options: Any, scale: Scale) -> Record:
    rank = {} if options.dt_rank is None else {"dt_rank": min(options.dt_rank, 3)}
    return rank | {"state_size": min(options.state_size, 4), "chunk_size": min(options.chunk_size or 4, 4)}


def _mamba2(options: Any, scale: Scale) -> Record:
    """Groups that divide over the mesh, or do not, as before; the widest heads up to 8 that fit."""
    groups, tensor, inner = options.num_groups, scale.tensor, options.expand * scale.d_model
    if groups % tensor == 0:
        small = min(groups, max(tensor, 2))
    else:
        small = 1 if groups == 1 else next(size for size in range(2, groups + 1) if size % tensor)
    step = math.lcm(small, tensor)
    widths = [width for width in range(1, 9) if inner % width == 0 and inner // width % step == 0]
    return {
        "num_groups": small,
        "head_dim": max(widths, default=options.head_dim),
        "state_size": min(options.state_size, 4),
        "chunk_size": min(options.chunk_size, 4),
    }


SMALLER: dict[type[Mixer], Callable[[Any, Scale], Record]] = {
    Attention: _attention,
    Infini: _infini,
    MLP: _mlp,
    Mamba: _mamba,
    Mamba2: _mamba2,
}
