"""Documents in, batches out. `batch(config, data_index)` is a pure function; all else serves it or reads ahead."""

from lcx.data.pipeline import Batch, batch, heldout_batches, heldout_documents, read_ahead, training_corpus
from lcx.data.sources import Corpus, Documents
from lcx.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "Documents",
    "Tokenizer",
    "batch",
    "heldout_batches",
    "heldout_documents",
    "load_tokenizer",
    "read_ahead",
    "training_corpus",
]
