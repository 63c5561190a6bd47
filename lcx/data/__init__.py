"""Documents in, batches out. `batch(config, data_index)` is a pure function; all else serves it or reads ahead."""

from lcx.data.documents import Documents, joined
from lcx.data.pipeline import (
    Batch,
    batch,
    check_data,
    documents_of,
    heldout_batches,
    heldout_documents,
    load_mixture,
    read_ahead,
    training_corpus,
)
from lcx.data.sources import Corpus
from lcx.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Documents",
    "Tokenizer",
    "batch",
    "check_data",
    "documents_of",
    "heldout_batches",
    "heldout_documents",
    "joined",
    "load_mixture",
    "load_tokenizer",
    "read_ahead",
    "training_corpus",
]
