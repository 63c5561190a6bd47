"""Small corpora on disk, and configs that read them."""

import itertools

import pytest

from lcx.config import Config
from lcx.data.sources import is_held_out


@pytest.fixture
def make_config(tmp_path):
    """make_config(train, heldout=(), *, batch_size, length, **data): a Config over documents given as bytes."""

    def make(train, heldout=(), *, batch_size=2, length=8, **data):
        folder = tmp_path / f"corpus{sum(1 for _ in tmp_path.iterdir())}"
        folder.mkdir()
        names = {wanted: _names(wanted) for wanted in (False, True)}
        for content, held in [*((content, False) for content in train), *((content, True) for content in heldout)]:
            (folder / next(names[held])).write_bytes(content)
        return Config.from_dict(
            {
                "data": {"sources": [{"name": "test", "path": folder}], **data},
                "model": {"vocab_size": max(256, 1 + (data.get("start_token") or 0))},
                "train": {"batch_size": batch_size, "sequence_length": length},
            }
        )

    return make


def _names(held_out):
    """File names in the order in which a source lists them that are, or are not, held out."""
    return (name for i in itertools.count() if is_held_out(name := f"{i:05}.txt") == held_out)
