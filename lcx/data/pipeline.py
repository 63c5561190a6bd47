"""Batches: any training batch from its index, the held-out pass, and a reader that stays ahead of the trainer."""

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcx.config import Config, SourceConfig
from lcx.data import mixture
from lcx.data.bestfit import load_plan
from lcx.data.documents import LONGEST, Collection, Documents, by_length, longest
from lcx.data.packing import cut_row, last_of_all, make_batch, read_piece, row_stride
from lcx.data.rows import BestFit, EndToEnd, Lanes, Packer
from lcx.data.shuffle import make_key
from lcx.data.sources import Corpus, Part, load_corpus
from lcx.data.stream import Slots
from lcx.data.synthetic import Examples, Task
from lcx.data.tokenizers import load_tokenizer
from lcx.data.worker_processes import read_in_processes
from lcx.errors import UserError
from lcx.stages import Stage, stage_at, stages

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """What a mixture is made of: a source, or its documents of some lengths."""

    name: str
    share: float
    """Of the mixture's rows, relative to the other datasets'."""
    loss_weight: float
    packer: Packer


@dataclass(frozen=True)
class Mixture:
    """The datasets of a stage, and where their rows go."""

    stage: Stage
    seed: int
    datasets: tuple[Dataset, ...]
    quota: np.ndarray
    """int64 [datasets]: rows of each in a block of the mixture; with carried states, lanes of each."""

    def assign(self, local_index: int, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The dataset of each wanted row of a batch, counted from the stage's first, and the row's number there."""
        train = self.stage.config.train
        if not train.carry_state:
            return mixture.assign(local_index * train.batch_size + wanted, self.quota, self.seed)
        borders = np.cumsum(self.quota)
        dataset = np.searchsorted(borders, wanted, side="right")
        return dataset, local_index * self.quota[dataset] + wanted - (borders - self.quota)[dataset]


def batch(config: Config | Mapping, data_index: int, rows: Sequence[int] | None = None) -> Batch:
    """The training batch of an index: a pure function of the config and the index.

    Args: config, a Config or the mapping that makes one; data_index from 0; rows, the rows of the batch that are
    wanted, each in range(batch_size), or None for all. Only what is wanted is read.

    Returns the arrays of packing.make_batch, in the order of `rows`; row_index counts the rows of the run. Raises
    UserError as load_corpus, and for prepared data of which too much cannot be read.
    """
    config = _as_config(config)
    stage = stage_at(config, data_index)
    mixed = load_mixture(config, stage.number)
    train = stage.config.train
    wanted = np.arange(train.batch_size) if rows is None else np.asarray(rows, np.int64)
    local_index = data_index - stage.first_index
    dataset, numbers = mixed.assign(local_index, wanted)
    pieces: list = [None] * len(wanted)
    loss_weights = np.ones((len(wanted), 1), np.float32)
    for number in sorted(set(dataset.tolist())):
        here = np.flatnonzero(dataset == number)
        loss_weights[here] = mixed.datasets[number].loss_weight
        for row, found in zip(here.tolist(), mixed.datasets[number].packer.rows(numbers[here]), strict=True):
            pieces[row] = found
    row_index = stage.first_row + local_index * train.batch_size + wanted
    made = make_batch(pieces, train.sequence_length, row_index)
    made["loss_weights"] *= loss_weights
    return made


def documents_of(config: Config | Mapping, data_index: int) -> list[dict[str, Any]]:
    """Which documents the batch of an index is read from: {"source", "documents"} of each of its rows."""
    config = _as_config(config)
    stage = stage_at(config, data_index)
    mixed = load_mixture(config, stage.number)
    rows = np.arange(stage.config.train.batch_size)
    chosen, numbers = mixed.assign(data_index - stage.first_index, rows)
    datasets = [mixed.datasets[number] for number in chosen.tolist()]
    return [
        {"source": dataset.name, "documents": dataset.packer.names(number)}
        for dataset, number in zip(datasets, numbers.tolist(), strict=True)
    ]


def _as_config(config: Config | Mapping) -> Config:
    """A Config as it is: to validate it again would take as long as to read a batch."""
    return config if isinstance(config, Config) else Config.from_dict(config)


def load_mixture(config: Config, stage_number: int) -> Mixture:
    """The datasets of a stage, their documents and plans loaded; the last few stay in memory."""
    return _load_mixture(config.key, stage_number)


@functools.lru_cache(maxsize=8)
def _load_mixture(key: str, number: int) -> Mixture:
    config = Config.from_dict(json.loads(key))
    stage = stages(config)[number]
    train, data = stage.config.train, stage.config.data
    seed = data.seed if number == 0 else make_key("stage", data.seed, number)
    parts = {part.name: part for part in training_corpus(config).parts}
    chosen = [(source, strata(source, parts[source.name])) for source in data.sources]
    shares = [source.weight * share for source, found in chosen for _, share in found]
    if train.carry_state and train.batch_size < len(shares):
        raise UserError(
            f"train.carry_state: {len(shares)} datasets do not divide the {train.batch_size} rows of a batch: each "
            "needs a row of its own; raise train.batch_size or read fewer sources."
        )
    quota = mixture.apportion(shares, train.batch_size if train.carry_state else mixture.BLOCK)
    datasets, lanes = [], iter(quota.tolist())
    for source, found in chosen:
        for documents, share in found:
            packer = _packer(stage.config, parts[source.name], documents, seed, next(lanes))
            datasets.append(Dataset(source.name, source.weight * share, source.loss_weight, packer))
    return Mixture(stage, seed, tuple(datasets), quota)


def strata(source: SourceConfig, part: Part) -> list[tuple[Collection | Task, float]]:
    """The documents of a source by length, with the share of the source's rows that each length gets.

    A length's share is its tokens times its weight of length_weights. Raises UserError where nothing is left.
    """
    if not source.length_weights:
        return [(part.train, 1.0)]
    if isinstance(part.train, Task):
        raise UserError(f'data.sources "{source.name}": examples of {source.path} are all of one length.')
    weights = {0: 1.0} | {int(border): weight for border, weight in source.length_weights.items()}
    borders = sorted(weights)
    parts = zip(by_length(part.train, borders), borders, strict=True)
    found = [(documents, weights[border]) for documents, border in parts]
    found = [(documents, documents.total * weight) for documents, weight in found if len(documents) and weight]
    total = sum(share for _, share in found)
    if not total:
        raise UserError(f'data.sources "{source.name}": no document has a length that length_weights wants.')
    return [(documents, share / total) for documents, share in found]


def _packer(config: Config, part: Part, documents: Collection | Task, seed: int, lanes: int) -> Packer:
    length, start_token = config.train.sequence_length, config.data.start_token
    if isinstance(documents, Task):
        if documents.common.length > length + 1:
            raise UserError(
                f'data.sources "{part.name}": examples of {documents.common.length} tokens do not fit into rows of '
                f"{length}: set options.length to at most {length + 1}."
            )
        return Examples(documents, seed, length)
    if config.train.carry_state:
        document, tokens = longest(documents)
        if tokens > LONGEST:
            raise UserError(
                f'data.sources "{part.name}": the document {documents.name(document)} has {tokens:,} tokens, more than '
                f"positions that are carried can count ({LONGEST:,}): cut it, or train without train.carry_state."
            )
        return Lanes(documents, seed, length, lanes)
    if config.data.packing == "best_fit":
        chosen = f"{part.fingerprint} {len(documents)} {documents.total}"
        plan = load_plan(documents, hashlib.sha256(chosen.encode()).hexdigest(), length, seed, start_token)
        if not len(plan):
            raise UserError(
                f'data.sources "{part.name}": no document has two tokens, so that nothing can be predicted.'
            )
        return BestFit(documents, plan, seed, start_token)
    return EndToEnd(documents, seed, length, start_token)


def _stride(config: Config) -> int:
    return row_stride(config.train.sequence_length, config.data.start_token)


def training_corpus(config: Config) -> Corpus:
    """The corpus, once it is clear that the model has an embedding for each of its tokens, and a row room for two."""
    data, start = config.data, config.data.start_token
    vocab_size = load_tokenizer(data.tokenizer, start).vocab_size
    if vocab_size > config.model.vocab_size:
        extra = "" if start is None else f" with data.start_token={start}"
        raise UserError(
            f'model.vocab_size is {config.model.vocab_size}, but the tokenizer "{data.tokenizer}"{extra} '
            f"has {vocab_size} tokens: set it to at least that."
        )
    if not _stride(config):
        raise UserError(f"train.sequence_length must be at least 2 with data.start_token={start}, which takes a place.")
    return load_corpus(data)


def check_data(config: Config | Mapping) -> Corpus:
    """The corpus, with the mixtures of all stages loaded: whatever the user must mend is said before training."""
    config = _as_config(config)
    corpus = training_corpus(config)
    for stage in stages(config):
        load_mixture(config, stage.number)
    return corpus


def heldout_rows(documents: Documents, stride: int, max_rows: int = 0) -> np.ndarray:
    """The rows of the held-out documents that are scored, int64: all, or max_rows of them at equal distances."""
    count = max(0, -(-(documents.tokens.size - 1) // stride))
    chosen = count if not max_rows else min(count, max_rows)
    return np.arange(chosen) * count // max(chosen, 1)


def heldout_documents(config: Config | Mapping, max_rows: int = 0) -> Documents:
    """The stretches of held-out documents that `heldout_batches(config, max_rows)` scores, as documents, in order.

    A yardstick that scores these documents, each one's first token left out, scores the same tokens.
    """
    config = _as_config(config)
    heldout, stride = training_corpus(config).heldout, _stride(config)
    rows = heldout_rows(heldout, stride, max_rows)
    if np.array_equal(rows, heldout_rows(heldout, stride)):
        return heldout
    pieces, names, scored = [], [], []
    for start in rows * stride:
        stop = min(start + stride + 1, heldout.tokens.size)
        first, last = np.searchsorted(heldout.offsets, [start, stop], side="right")
        borders = [start, *heldout.offsets[first:last].tolist(), stop]
        spans = [(a, b) for a, b in itertools.pairwise(borders) if a < b]
        pieces += [heldout.tokens[a:b] for a, b in spans]
        scored += [] if heldout.scored is None else [heldout.scored[a:b] for a, b in spans]
        names += [heldout.names[np.searchsorted(heldout.offsets, a, side="right") - 1] for a, _ in spans]
    offsets = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)
    return Documents(np.concatenate(pieces), offsets, tuple(names), np.concatenate(scored) if scored else None)


def heldout_batches(config: Config | Mapping, max_rows: int = 0, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """One pass over the held-out documents, in order, in full batches; nothing is yielded if nothing is held out.

    Each token but a document's first is a target of weight 1 exactly once. The last row is padded (segment 0, weight
    0), and the last batch with rows of padding. max_rows: score this many rows, at equal distances; 0 = all. rows: as
    of `batch`, in each batch.
    """
    config = _as_config(config)
    documents = training_corpus(config).heldout
    length, stride, batch_size = config.train.sequence_length, _stride(config), config.train.batch_size
    unshuffled = Slots(np.arange(len(documents)), documents.offsets)
    scored = heldout_rows(documents, stride, max_rows)
    beyond = -(-documents.total // stride) + np.arange(-len(scored) % batch_size)  # rows of padding: full batches
    wanted = slice(None) if rows is None else np.asarray(rows, np.int64)
    for row_index in np.concatenate([scored, beyond]).reshape(-1, batch_size)[:, wanted]:
        pieces = []
        for start in (row_index * stride).tolist():
            stop = min(start + length + 1, documents.total)
            if start >= stop:
                pieces.append([])
                continue
            piece = read_piece(documents, unshuffled.spans(start, stop))
            piece = piece if stop - start == length + 1 else last_of_all(piece)
            pieces.append([cut_row(piece, length, config.data.start_token)])
        yield make_batch(pieces, length, row_index)


def read_ahead(
    config: Config | Mapping, start_index: int = 0, rows: Sequence[Sequence[int]] | None = None
) -> Iterator[tuple[int, Batch]]:
    """(data_index, batch) for data_index = start_index, start_index + 1, ... without end.

    rows: those that are wanted, as of `batch`, of each stage; stages may differ in the size of a batch. None: all.

    data.workers threads read ahead, or data.worker_processes processes where there are any; 0 reads in line. The
    batches are the same. All data is loaded before this returns, so that its UserErrors come at once. Close the
    generator, or drop it, to stop whatever reads.
    """
    config = _as_config(config)
    check_data(config)
    if config.data.worker_processes:
        return read_in_processes(config, start_index, rows)
    return _read_ahead(config, start_index, rows)


def _read_ahead(config: Config, start_index: int, rows: Sequence[Sequence[int]] | None) -> Iterator[tuple[int, Batch]]:
    import grain  # takes a second, which only training should pay

    # Threads: worker processes outlive a killed parent. More threads or a longer buffer than this gains nothing.
    options = grain.ReadOptions(num_threads=config.data.workers, prefetch_buffer_size=2 * config.data.workers)
    indices = grain.MapDataset.range(start_index, sys.maxsize)
    wanted = lambda index: None if rows is None else rows[stage_at(config, index).number]  # noqa: E731
    reader = iter(indices.map(lambda index: (index, batch(config, index, wanted(index)))).to_iter_dataset(options))
    try:
        yield from reader
    finally:
        reader.close()
