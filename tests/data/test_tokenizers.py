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


def test_a_number_that_is_no_byte_spoils_nothing_else():
    """A model may have a larger vocabulary than 256, so that it divides on a mesh."""
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([97, 300, 98]).decode() == "".join(tokenizer.decode_stream([97, 300, 98])) == "a\ufffdb"


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


def test_a_start_token_begins_every_encoding_and_no_text():
    plain, tokenizer = load_tokenizer("bytes"), load_tokenizer("bytes", 256)
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == np.int32 and tokens.tolist() == [256, *TEXT.encode()]
    assert tokenizer.encode("").tolist() == [256] and tokenizer.encode("").dtype == np.int32
    assert tokenizer.decode(tokens) == TEXT.encode()
    assert "".join(tokenizer.decode_stream(np.insert(tokens, [3, 9], 256))) == TEXT  # inside characters, too
    assert (plain.vocab_size, tokenizer.vocab_size, load_tokenizer("bytes", 300).vocab_size) == (256, 257, 301)
    assert (plain.start_token, tokenizer.start_token) == (None, 256)
    assert len({load_tokenizer("bytes", start).fingerprint for start in (None, 256, 300)}) == 3
    with pytest.raises(UserError, match="data.start_token=255 is an ordinary byte: with data.tokenizer=bytes use 256"):
        load_tokenizer("bytes", 255)


def test_a_start_token_of_a_json_tokenizer(json_file, tmp_path):
    """A special token of the file or a new one, not an ordinary one; text that spells it is text."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(json_file))
    inner.add_special_tokens(["<s>"])
    inner.add_tokens(["plain"])
    path = str(tmp_path / "special.json")
    inner.save(path)
    special, ordinary, size = inner.token_to_id("<s>"), inner.token_to_id("plain"), inner.get_vocab_size()
    text = "a way <s> to say <s>"
    tokenizer = load_tokenizer(path, special)
    tokens = tokenizer.encode(text).tolist()
    assert tokens[0] == special and special not in tokens[1:] and tokenizer.vocab_size == size
    assert tokenizer.decode(tokens) == "".join(tokenizer.decode_stream(tokens)).encode() == text.encode()
    assert load_tokenizer(path).encode(text).tolist().count(special) == 2  # as the library has it
    assert load_tokenizer(path, size).encode("a").tolist() == [size, *load_tokenizer(path).encode("a")]
    assert load_tokenizer(path, size + 5).vocab_size == size + 6
    for token, name in ((ordinary, "plain"), (inner.token_to_id("a"), "a")):
        with pytest.raises(
            UserError, match=f'data.start_token={token} is "{name}", an ordinary token of .*special.json'
        ):
            load_tokenizer(path, token)


def test_bad_tokenizers_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match='unknown tokenizer "byte"'):
        load_tokenizer("byte")
    with pytest.raises(UserError, match="absent.json: No such file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="broken.json is not a JSON file of the tokenizers library"):
        load_tokenizer(str(broken))
