import numpy as np
import pytest

from lcx.data.tokenizers import load_tokenizer
from lcx.errors import UserError

TEXT = "naïve — 日本 🙂"


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a long long long way to say a long word " * 20], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    tokenizer.save(str(path))
    return path


def test_bytes_are_their_own_tokens():
    tokenizer = load_tokenizer("bytes")
    everything = bytes(range(256))
    tokens = tokenizer.encode(everything)
    assert tokens.dtype == np.int32 and tokens.tolist() == list(range(256)) and tokenizer.vocab_size == 256
    assert tokenizer.decode(tokens) == everything
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT.encode()


def test_byte_stream_yields_characters_when_they_are_complete():
    tokenizer = load_tokenizer("bytes")
    arrived = []

    def tokens(content):
        for token in content:
            arrived.append(token)
            yield token

    seen = [(text, len(arrived)) for text in tokenizer.decode_stream(tokens("aé🙂b".encode()))]
    assert seen == [("a", 1), ("é", 3), ("🙂", 7), ("b", 8)]
    assert "".join(tokenizer.decode_stream(b"ok\xff\xe6\x97!\xe6")) == b"ok\xff\xe6\x97!\xe6".decode(errors="replace")


def test_json_tokenizer_round_trip(json_file):
    tokenizer = load_tokenizer(str(json_file))
    text = "a long way " + TEXT
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32 and 4 < tokens.size < len(text.encode())  # neither truncated nor one a byte
    assert tokenizer.encode("a").size == 1  # nor padded
    assert tokenizer.decode(tokens) == text.encode()
    assert "".join(tokenizer.decode_stream(tokens)) == text
    assert tokenizer.encode(text.encode()).tolist() == tokens.tolist()
    assert 256 < tokenizer.vocab_size <= 300 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.fingerprint != load_tokenizer("bytes").fingerprint


def test_bad_tokenizers_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match='unknown tokenizer "byte"'):
        load_tokenizer("byte")
    with pytest.raises(UserError, match="absent.json: No such file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="broken.json is not a JSON file of the tokenizers library"):
        load_tokenizer(str(broken))
