"""Perplexity: by position, at fixed lengths, in sliding windows and over whole documents.

All in bits per token. The first three read the same documents, those that are longer than the longest length, cut to
it; so what differs between two lengths is how far the model sees back, not what it reads.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lcx.errors import UserError
from lcx.evaluation.streaming import row_losses, stream_losses
from lcx.evaluation.suite import Curves, Finding, Material
from lcx.models import LanguageModel
from lcx.schema import limited


@dataclass(frozen=True)
class Options:
    """What is read, and how."""

    files: str = ""  # a file or folder of text; "": what the run holds out
    lengths: tuple[int, ...] | None = None  # tokens; None: of training, and 2, 4 and 8 times as many
    documents: int = limited(16, minimum=1)  # at most so many
    window: int | None = limited(None, minimum=2)  # tokens of a sliding window; None: of training
    stride: int | None = limited(None, minimum=1)  # tokens scored in each window, its last ones; None: half of it
    whole: int = limited(4, minimum=0)  # documents that are read whole
    longest: int = limited(2**17, minimum=2)  # tokens of the longest document that is read whole


def run(model: LanguageModel, options: Options, material: Material) -> Iterator[Finding]:
    """Yields bits per token at each length, by position, in windows and over whole documents."""
    documents = [np.asarray(document, np.int32) for document in material.documents(options.files)]
    lengths = material.lengths(options.lengths)
    rows = long_rows(documents, lengths[-1], options, material)
    started, begun = _begun(rows, material)
    by_place = np.concatenate([row_losses(model, part, material.chunk_size) for part in batches(started, material)])
    by_place = by_place[:, begun:]
    at_length = {length: _at_length(model, rows, length, material) for length in lengths[:-1]}
    at_length[lengths[-1]] = bits_of(by_place)
    for length, bits in at_length.items():
        yield f"bits_at_{length}", bits
    ends = bucket_ends(lengths[-1])
    buckets = [bits_of(by_place[:, a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    for end, bits in zip(ends, buckets, strict=True):
        yield f"bits_before_{end}", bits
    cumulative = [bits_of(by_place[:, :end]) for end in ends]
    trained = {"training length": material.train_length}
    axes = dict(x_name="tokens", y_name="bits per token", log_x=True, marks=trained)
    lines = {"this bucket": buckets, "all before": cumulative}
    yield "bits by position", Curves(ends, lines, **axes | {"x_name": "position"})
    yield "bits at length", Curves(list(at_length), {"documents cut to a length": list(at_length.values())}, **axes)
    window = options.window or material.train_length
    stride = options.stride or max(1, window // 2)
    yield f"bits_sliding_{window}_{stride}", _sliding(model, rows, window, stride, material)
    chosen = [document for document in documents if 2 <= len(document) <= options.longest][: options.whole]
    if chosen:
        losses = np.concatenate([stream_losses(model, document, material.chunk_size) for document in chosen])
        yield "bits_of_whole_documents", bits_of(losses)


def bits_of(nats: np.ndarray) -> float:
    """Mean in bits per token, summed in float64."""
    return float(np.mean(nats, dtype=np.float64) / math.log(2))


def bucket_ends(length: int) -> list[int]:
    """Powers of two from 64 up to a length, and the length; positions in [64, 128) are the bucket that ends at 128."""
    return [2**i for i in range(6, length.bit_length()) if 2**i < length] + [length]


def long_rows(documents: Sequence[np.ndarray], length: int, options: Options, material: Material) -> np.ndarray:
    """The first `length` + 1 tokens of documents that have as many, int32 [documents, length + 1].

    Start tokens are left out: each piece gets one of its own where it begins.
    """
    start = material.tokenizer.start_token
    documents = [document[1:] if start is not None and document[0] == start else document for document in documents]
    found = [document[: length + 1] for document in documents if len(document) > length][: options.documents]
    if not found:
        longest = max(map(len, documents), default=0)
        raise UserError(
            f"no document has more than {length} tokens (the longest has {longest}): set "
            "evaluation.options.perplexity.lengths to shorter ones, or files to longer text."
        )
    return np.stack(found)


def batches(rows: np.ndarray, material: Material) -> Iterator[np.ndarray]:
    """Rows in batches of the material's size, the last one as large as it is."""
    for start in range(0, len(rows), material.batch_size):
        yield rows[start : start + material.batch_size]


def _at_length(model: LanguageModel, rows: np.ndarray, length: int, material: Material) -> float:
    """Rows cut into pieces of a length that do not overlap, each read as a document that begins there."""
    count = (rows.shape[1] - 1) // length
    pieces = np.stack([row[i * length : (i + 1) * length + 1] for row in rows for i in range(count)])
    pieces, begun = _begun(pieces, material)
    losses = [row_losses(model, part, material.chunk_size)[:, begun:] for part in batches(pieces, material)]
    return bits_of(np.concatenate(losses))


def _sliding(model: LanguageModel, rows: np.ndarray, window: int, stride: int, material: Material) -> float:
    """Windows, each read as a document that begins there; of each the last `stride` tokens count, of the first all."""
    size = min(window, rows.shape[1] - 1)
    starts = range(0, rows.shape[1] - size, min(stride, size))
    pieces = np.stack([row[start : start + size + 1] for row in rows for start in starts])
    pieces, begun = _begun(pieces, material)
    losses = np.concatenate(
        [row_losses(model, part, material.chunk_size)[:, begun:] for part in batches(pieces, material)]
    )
    scored = np.zeros(losses.shape, bool)
    scored[:, -min(stride, size) :] = True
    scored[:: len(starts)] = True
    return bits_of(losses[scored])


def _begun(pieces: np.ndarray, material: Material) -> tuple[np.ndarray, int]:
    """Pieces after the start token, where there is one, and how many predictions that adds in front, not to count."""
    if material.tokenizer.start_token is None:
        return pieces, 0
    return np.insert(pieces, 0, material.tokenizer.start_token, axis=1), 1
