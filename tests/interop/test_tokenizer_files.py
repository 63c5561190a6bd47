"""Tokenizer files: the `tokenizers` library, on which transformers stands, gives lcx's own tokens."""

import json

import pytest
from etils import epath
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from lcx.data import load_tokenizer
from lcx.interop.tokenizer_files import first_token, write_tokenizer

TEXTS = ["", "def main(x):\n\treturn 'y'", "\u00e9t\u00e9 \U0001f600\x00\x7f\u0100", "a <|end|> b", " <|start|>"]


def read(folder) -> Tokenizer:
    """As transformers reads them: special tokens are parsed in text unless the config says no."""
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.encode_special_tokens = json.loads((folder / "tokenizer_config.json").read_text())["split_special_tokens"]
    return made


@pytest.fixture
def words(tmp_path):
    """A small tokenizer of words with special tokens, and a post-processor of its own."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator(["def main return x y a b end start"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


@pytest.mark.parametrize("start", [None, 256, 263])
def test_bytes(start, tmp_path):
    ours = load_tokenizer("bytes", start)
    special = write_tokenizer(epath.Path(tmp_path), "bytes", start, ours.end_token, 128)
    theirs = read(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text).ids == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(TEXTS[2]).tolist()) == TEXTS[2]
    assert special["eos_token_id"] == (255 if start is None else start)
    assert special.get("bos_token_id") == start
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert theirs.token_to_id(config["eos_token"]) == special["eos_token_id"] and config["model_max_length"] == 128


@pytest.mark.parametrize("start", [None, 1])
def test_a_file(start, words, tmp_path):
    ours = load_tokenizer(words, start)
    assert ours.end_token == (2 if start is None else 1)
    out = tmp_path / "out"
    out.mkdir()
    special = write_tokenizer(epath.Path(out), words, start, ours.end_token, 64)
    theirs = read(out)
    for text in [*TEXTS, "def main </s> x"]:
        assert theirs.encode(text).ids == ours.encode(text).tolist(), text
    assert special == {"eos_token_id": ours.end_token, "pad_token_id": ours.end_token} | (
        {} if start is None else {"bos_token_id": 1}
    )


def test_what_encodings_begin_with(words):
    content = json.loads(open(words).read())
    assert first_token(content) == 1
    nested = {"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, content["post_processor"]]}}
    assert first_token(nested) == 1
    assert first_token({"post_processor": None}) is first_token({}) is None
