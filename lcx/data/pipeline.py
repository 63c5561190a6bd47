"""Batches: any training batch from its index, the held-out pass, and a reader that stays ahead of the trainer."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lcx.config import Config
from lcx.data.packing import Slots, cut_places, make_batch, permute_rows, read_slots, read_stream, row_stride
from lcx.data.sources import Corpus, Documents, load_corpus
from lcx.data.tokenizers import load_tokenizer
from lcx.errors import UserError

Batch = dict[str, np.ndarray]


def batch(config: Config | Mapping, data_index: int, rows: Sequence[int] | None = None) -> Batch:
    """The training batch of an index: a pure function of the config and the index.

    Args: config, a Config or the mapping that makes one; data_index from 0; rows, the rows of the batch that are
    wanted, each in range(batch_size), or None for all.

    Returns the arrays of packing.make_batch for rows [data_index * batch_size + r for r in rows] of the stream, in the
    order of `rows`. Raises UserError as load_corpus.
    """
    config = _as_config(config)
    documents = training_corpus(config).train
    wanted = np.arange(config.train.batch_size) if rows is None else np.asarray(rows, np.int64)
    row_index = data_index * config.train.batch_size + wanted
    length, stride, seed = config.train.sequence_length, _stride(config), config.data.seed
    places = cut_places(permute_rows(row_index, documents.tokens.size, stride, seed), length, stride)
    tokens, first = read_stream(documents, seed, places)
    return make_batch(tokens, first, np.zeros_like(first), row_index, config.data.start_token)


def _as_config(config: Config | Mapping) -> Config:
    """A Config as it is: to validate it again would take as long as to read a batch."""
    return config if isinstance(config, Config) else Config.from_dict(config)


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
    pieces, names = [], []
    for start in rows * stride:
        stop = min(start + stride + 1, heldout.tokens.size)
        first, last = np.searchsorted(heldout.offsets, [start, stop], side="right")
        borders = [start, *heldout.offsets[first:last].tolist(), stop]
        spans = [(a, b) for a, b in itertools.pairwise(borders) if a < b]
        pieces += [heldout.tokens[a:b] for a, b in spans]
        names += [heldout.names[np.searchsorted(heldout.offsets, a, side="right") - 1] for a, _ in spans]
    offsets = np.cumsum([0, *(piece.size for piece in pieces)], dtype=np.int64)
    return Documents(np.concatenate(pieces), offsets, tuple(names))


def heldout_batches(config: Config | Mapping, max_rows: int = 0, rows: Sequence[int] | None = None) -> Iterator[Batch]:
    """One pass over the held-out documents, in order, in full batches; nothing is yielded if nothing is held out.

    Each token but a document's first is a target of weight 1 exactly once. The last row is padded (segment 0, weight
    0), and the last batch with rows of padding. max_rows: score this many rows, at equal distances; 0 = all. rows: as
    of `batch`, in each batch.
    """
    config = _as_config(config)
    documents = training_corpus(config).heldout
    length, stride, batch_size = config.train.sequence_length, _stride(config), config.train.batch_size
    total = documents.tokens.size
    unshuffled = Slots(np.arange(len(documents)), documents.offsets[:-1])
    scored = heldout_rows(documents, stride, max_rows)
    beyond = -(-total // stride) + np.arange(-len(scored) % batch_size)  # rows of padding that fill the last batch
    wanted = slice(None) if rows is None else np.asarray(rows, np.int64)
    for row_index in np.concatenate([scored, beyond]).reshape(-1, batch_size)[:, wanted]:
        places = cut_places(row_index, length, stride)
        tokens, first = read_slots(documents, unshuffled, np.minimum(places, total - 1))
        padding = places >= total
        first = np.where(padding, places == total, first)
        tokens = np.where(padding, 0, tokens).astype(np.int32)
        yield make_batch(tokens, first, padding, row_index, config.data.start_token)


def read_ahead(
    config: Config | Mapping, start_index: int = 0, rows: Sequence[int] | None = None
) -> Iterator[tuple[int, Batch]]:
    """(data_index, batch) for data_index = start_index, start_index + 1, ... without end; rows as of `batch`.

    data.workers threads read ahead, 0 reads in line; the batches are the same. The corpus is loaded before this
    returns, so that its UserErrors come at once. Close the generator, or drop it, to stop the threads.
    """
    config = _as_config(config)
    training_corpus(config)
    return _read_ahead(config, start_index, rows)


def _read_ahead(config: Config, start_index: int, rows: Sequence[int] | None) -> Iterator[tuple[int, Batch]]:
    import grain  # takes a second, which only training should pay

    # Threads: worker processes outlive a killed parent. More threads or a longer buffer than this gains nothing.
    options = grain.ReadOptions(num_threads=config.data.workers, prefetch_buffer_size=2 * config.data.workers)
    indices = grain.MapDataset.range(start_index, sys.maxsize)
    reader = iter(indices.map(lambda index: (index, batch(config, index, rows))).to_iter_dataset(options))
    try:
        yield from reader
    finally:
        reader.close()
