import dataclasses
import hashlib
import itertools
import json
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from lcx.config import Config, DataConfig, SourceConfig
from lcx.data import readers
from lcx.data.sources import is_held_out, load_corpus
from lcx.errors import UserError


def corpus_of(*paths, **fields):
    sources = tuple(SourceConfig(name=f"s{i}", path=str(path), **fields) for i, path in enumerate(paths))
    return load_corpus(DataConfig(sources=sources))


def only(corpus):
    """The only part of a corpus."""
    (part,) = corpus.parts
    return part


def contents(documents):
    return [bytes(documents.tokens[a:b]) for a, b in zip(documents.offsets, documents.offsets[1:], strict=False)]


def test_standard_library():
    start = time.perf_counter()
    corpus = load_corpus(DataConfig())
    assert time.perf_counter() - start < 10  # 0.3 s; the bound only catches a loop over bytes

    root = Path(sysconfig.get_path("stdlib"))
    everything = {
        path: (root / path).read_bytes()
        for path in (file.relative_to(root).as_posix() for file in root.rglob("*.py"))
        if "site-packages" not in path.split("/") and (root / path).stat().st_size
    }
    held = {path for path in everything if int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20 == 0}
    train_contents = {content for path, content in everything.items() if path not in held}
    assert set(corpus.heldout.names) == {path for path in held if everything[path] not in train_contents}
    train = only(corpus).train
    assert list(train.names) == sorted(train.names) and not held & set(train.names)
    assert set(contents(train)) == train_contents and len(train_contents) == len(train)
    assert contents(train)[0] == everything[train.names[0]]
    assert train.tokens.dtype == np.uint8


def test_heldout_names_do_not_depend_on_the_corpus():
    names = [f"{i}.txt" for i in range(4000)]
    held = [name for name in names if is_held_out(name)]
    assert 150 < len(held) < 250
    assert [int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 for name in held] == [0] * len(held)


def test_duplicates_are_kept_once_and_training_keeps_them(make_config):
    config = make_config([b"one", b"two", b"one", b"", b"three"], [b"four", b"two", b"five", b"four"])
    corpus = load_corpus(config.data)
    assert contents(only(corpus).train) == [b"one", b"two", b"three"]
    assert contents(corpus.heldout) == [b"four", b"five"]


def test_nothing_is_held_out_of_a_corpus_that_would_be_empty(make_config):
    corpus = load_corpus(make_config([], [b"one", b"two"]).data)
    assert contents(only(corpus).train) == [b"one", b"two"] and len(corpus.heldout) == 0
    assert corpus.heldout.offsets.tolist() == [0]


def test_folder_file_and_jsonl(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b" / "1.txt").write_text("in b")
    (folder / "a.txt").write_text("in a")
    (folder / ".hidden").write_text("hidden")
    (folder / ".git" / "config").write_text("hidden too")
    (folder / "e.jsonl").write_text('{"text": "line one", "id": 7}\n\n{"text": ""}\n{"text": "line four \\u00e9"}')
    corpus = corpus_of(folder)
    assert only(corpus).train.names == ("a.txt", "b/1.txt", "e.jsonl:1", "e.jsonl:4")
    assert contents(only(corpus).train) == [b"in a", b"in b", b"line one", "line four é".encode()]
    assert only(corpus_of(folder / "e.jsonl")).train.names == ("e.jsonl:1", "e.jsonl:4")
    assert contents(only(corpus_of(folder / "e.jsonl", format="text")).train)[0].startswith(b'{"text"')
    assert contents(only(corpus_of(folder / "a.txt")).train) == [b"in a"]
    both = corpus_of(folder / "b", folder / "a.txt")
    assert [contents(part.train) for part in both.parts] == [[b"in b"], [b"in a"]]


def test_jsonl_lines_are_held_out_by_line(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(1, 201)))
    corpus = corpus_of(file)
    assert [is_held_out(f"lines.jsonl:{i}") for i in range(1, 201)].count(True) == len(corpus.heldout) > 0
    assert contents(corpus.heldout)[0] == f"document {corpus.heldout.names[0].split(':')[1]}".encode()


def test_fingerprint_covers_names_and_contents(make_config, tmp_path):
    def fingerprint(*documents):
        return load_corpus(make_config(documents).data).fingerprint

    base = fingerprint(b"one", b"two")
    assert fingerprint(b"one", b"two") == fingerprint(b"one", b"two", b"") == base
    assert len({base, fingerprint(b"one", b"twp"), fingerprint(b"two", b"one"), fingerprint(b"onet", b"wo")}) == 4
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "renamed.txt").write_bytes(b"one")
    assert corpus_of(tmp_path / "x").fingerprint != fingerprint(b"one")


def test_fingerprint_covers_the_tokenizer(make_config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    fingerprints = {load_corpus(make_config([b"one"]).data).fingerprint}
    for i, vocabulary in enumerate([{"one": 0}, {"one": 0, "two": 1}]):
        path = str(tmp_path / f"{i}.json")
        tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="one")).save(path)
        fingerprints.add(load_corpus(make_config([b"one"], tokenizer=path).data).fingerprint)
    assert len(fingerprints) == 3


def test_documents_begin_with_the_start_token(make_config):
    plain = load_corpus(make_config([b"one", b"two", b"one"], [b"three"]).data)
    data = make_config([b"one", b"two", b"one"], [b"three"], start_token=256).data
    corpus = load_corpus(data)
    for documents, texts in ((only(corpus).train, [b"one", b"two"]), (corpus.heldout, [b"three"])):
        pieces = [documents.tokens[a:b].tolist() for a, b in itertools.pairwise(documents.offsets)]
        assert pieces == [[256, *text] for text in texts]
    assert only(corpus).train.tokens.dtype == np.uint16 and only(corpus).train.names == only(plain).train.names
    assert corpus.fingerprint != plain.fingerprint
    assert load_corpus(dataclasses.replace(data, start_token=257)).fingerprint != corpus.fingerprint


def test_text_without_tokens_is_no_document_even_with_a_start_token(make_config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0}, unk_token="one"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    for start_token, tokens in ((None, [0, 0]), (1, [1, 0, 1, 0])):
        data = make_config(
            [b"one", b" \n ", b"two"], tokenizer=str(tmp_path / "words.json"), start_token=start_token
        ).data
        assert only(load_corpus(data)).train.tokens.tolist() == tokens


def test_the_corpus_is_loaded_once_whatever_the_seed(make_config):
    data = make_config([b"one"]).data
    assert load_corpus(data) is load_corpus(dataclasses.replace(data, seed=5, workers=0))


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "fine"}\n{"text": ', "bad.jsonl, line 2: not a JSON object"),
        (b'{"text": "fine"}\n\n{"body": "x"}', 'bad.jsonl, line 3: a record needs a field "text"'),
        (b'{"text": 3}', 'bad.jsonl, line 1: a record needs a field "text"'),
        (b"[" * 100_000, "bad.jsonl, line 1: not a JSON object"),
        (b'{"text": "\xff"}', "bad.jsonl, line 1: not a JSON object"),
        (b'{"text": ""}\n', "the corpus is empty"),
        (b"", "the corpus is empty"),
    ],
)
def test_bad_jsonl_is_named_by_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpus_of(tmp_path / "bad.jsonl")


def test_bad_sources_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match='data.sources "s0": there is no file or folder .*absent'):
        corpus_of(tmp_path / "absent")
    with pytest.raises(UserError, match="the corpus is empty: no document with text in .*empty"):
        corpus_of(tmp_path / "empty")
    with pytest.raises(UserError, match='unknown format "json": did you mean "jsonl"'):
        corpus_of("stdlib", format="json")
    with pytest.raises(UserError, match="unknown tokenizer"):
        load_corpus(Config.from_dict({"data": {"tokenizer": "words"}}).data)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "_open", refuse)
    (tmp_path / "secret.txt").touch()
    with pytest.raises(UserError, match="cannot read .*secret.txt: Permission denied"):
        corpus_of(tmp_path / "secret.txt")


def test_a_lone_surrogate_in_jsonl_does_not_stop_the_run(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": "a\\ud800b"}')
    assert contents(only(corpus_of(tmp_path / "s.jsonl")).train) == [b"a?b"]
