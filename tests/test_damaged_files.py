"""Whatever stands in a file that lcx reads, it is read, or refused with a sentence: never a traceback, a hang, a write
outside the folder, or code that is run."""

import ast
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcx.config import default_config, load_config
from lcx.errors import UserError
from lcx.files import read_lines, write_json
from lcx.training.telemetry import cut_back

SHORT, LONG = 20, 400  # inputs of each of the five readers: 100 in `make test`, 2,000 in `make drills`

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../../etc/passwd")
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of a file, damaged: cut, overwritten, or with another value somewhere in its JSON."""
    kind = draw(st.sampled_from(["noise", "cut", "overwritten", "another value", "another value", "another value"]))
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if kind == "overwritten":
        place, bytes_ = draw(st.integers(0, len(whole) - 1)), draw(st.binary(min_size=1, max_size=4))
        return whole[:place] + bytes_ + whole[place + len(bytes_) :]
    return json.dumps(replaced(draw, json.loads(whole))).encode()


def replaced(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with another value at some depth, a key removed, or one added."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 4)) == 0:
        return draw(values)
    tree = tree.copy()
    places = list(tree) if isinstance(tree, dict) else range(len(tree))
    place = draw(st.sampled_from(places))
    act = draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
    if act == "remove":
        del tree[place]
    elif act == "add" and isinstance(tree, dict):
        tree[draw(st.text(max_size=8) | st.just("../outside"))] = draw(values)
    else:
        tree[place] = replaced(draw, tree[place])
    return tree


def manifest(folder: Path) -> Callable[[bytes], None]:
    from lcx.training.checkpointing import Checkpoints, manifest_digest, newest

    files = {"a/b": {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "size": 0}}

    def read(data: bytes) -> None:
        place = folder / "run" / "checkpoints"
        (place / "7" / "a").mkdir(parents=True, exist_ok=True)
        (place / "7" / "a" / "b").write_bytes(b"")
        (place / "7.manifest.json").write_bytes(data)
        newest(place, lambda text: None)
        checkpoints = Checkpoints(place, keep=1, say=lambda text: None)
        checkpoints._newest_whole()  # sets aside what is damaged
        checkpoints._staying() if checkpoints.steps() else None
        checkpoints.close()

    record = {"step": 7, "files": files, "seconds": 1.0, "score": 2.0}
    read.whole = json.dumps({"format_version": 1, **record, "digest": manifest_digest(record)}).encode()
    return read


def config(folder: Path) -> Callable[[bytes], None]:
    from etils import epath

    from lcx.cli.load import read_config
    from lcx.config import Config
    from lcx.training.workdir import open_workdir

    here = load_config("configs/samba.py:size=tiny").to_dict()

    def read(data: bytes) -> None:
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "config.json").write_bytes(data)

        def resume() -> None:
            with open_workdir(folder / "run", here, {"data": "x"}):
                pass

        refused = []
        for reader in (
            lambda: read_config(epath.Path(folder / "run")),
            lambda: Config.from_dict(load_config(folder / "run" / "config.json")),
            resume,
        ):
            try:
                reader()
            except UserError as error:
                refused.append(error)
        if refused:
            raise refused[0]

    read.whole = json.dumps({"format_version": 1, "config": here, "fingerprints": {"data": "x"}}).encode()
    return read


def metrics(folder: Path) -> Callable[[bytes], None]:
    from lcx.evaluation.report import _bits_by_step

    def read(data: bytes) -> None:
        (folder / "run").mkdir(exist_ok=True)
        path = folder / "run" / "metrics.jsonl"
        path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + data + b"\n")
        _bits_by_step(read_lines(path), "loss")
        cut_back(path, 5)
        assert {"step": 1, "loss": 2.0} in read_lines(path)

    read.whole = json.dumps({"format_version": 1, "step": 2, "loss": 1.5, "data_index": 1, "skipped": 0}).encode()
    return read


def safetensors(folder: Path) -> Callable[[bytes], None]:
    from lcx.interop.safetensors import INDEX, SINGLE, Reader

    def read(data: bytes) -> None:
        """As the header of a file, and as the index of several."""
        here = folder / "run"
        here.mkdir(exist_ok=True)
        (folder / "outside.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        (here / SINGLE).write_bytes(struct.pack("<Q", len(data)) + data + bytes(16))
        refused = []
        try:
            reader = Reader(here)
            for name in reader.shapes:
                reader.tensor(name)
        except UserError as error:
            refused.append(error)
        (here / SINGLE).unlink()
        (here / INDEX).write_bytes(data)
        with suppress(UserError):
            Reader(here)
        (here / INDEX).write_bytes(b'{"weight_map": {"a": "../outside.safetensors"}}')
        with pytest.raises(UserError, match="outside"):
            Reader(here)
        if refused:
            raise refused[0]

    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    read.whole = json.dumps({"a": tensor, "__metadata__": {"format": "np"}}).encode()
    return read


def tokenizer(folder: Path) -> Callable[[bytes], None]:
    from lcx.data.tokenizers import JsonTokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[UNK]": 2}, "unk_token": "[UNK]"}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    whole |= {"pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model}

    def read(data: bytes) -> None:
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run" / "tokenizer.json").write_bytes(data)
        found = JsonTokenizer(folder / "run" / "tokenizer.json")
        assert found.encode("a b").dtype == np.int32
        found.decode([0, 1])

    read.whole = json.dumps(whole).encode()
    return read


READERS = [manifest, config, metrics, safetensors, tokenizer]
_written: list[str] = []  # paths that are opened for writing while a file is read


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _written.append(arguments[0])


def read_damaged(reader: Callable, folder: Path, count: int) -> dict[str, int]:
    """How many inputs were read, and how many refused."""
    counts = {"read": 0, "refused": 0}
    read = reader(folder)
    read(read.whole)
    sys.addaudithook(_watch)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=damaged(read.whole))
    def check(data: bytes) -> None:
        _written.clear()
        began = time.monotonic()
        try:
            read(data)
            counts["read"] += 1
        except UserError as error:
            assert str(error) and "Traceback" not in str(error)
            counts["refused"] += 1
        assert time.monotonic() - began < 20
        allowed = (str(folder), "/dev/null", "/proc/")
        outside = [path for path in _written if not os.path.abspath(path).startswith(allowed)]
        assert not outside, outside

    check()
    assert sorted(path.name for path in folder.iterdir() if path.name != "outside.safetensors") == ["run"]
    return counts


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_damaged_files_are_refused_with_a_sentence(reader, tmp_path):
    counts = read_damaged(reader, tmp_path, SHORT)
    assert counts["refused"] or reader is metrics or reader is manifest


@pytest.mark.slow
@pytest.mark.long
def test_two_thousand_damaged_files(tmp_path, request):
    found = {}
    for reader in READERS:
        (tmp_path / reader.__name__).mkdir()
        found[reader.__name__] = read_damaged(reader, tmp_path / reader.__name__, LONG)
    inputs = sum(sum(counts.values()) for counts in found.values())
    assert inputs >= 2000, found
    folder = Path(".cache/drills/results")
    folder.mkdir(parents=True, exist_ok=True)
    refused = sum(counts["refused"] for counts in found.values())
    result = f"{inputs:,} inputs, {refused:,} refused with a sentence, the others read; no write outside the folder"
    what = f"damaged files of {len(READERS)} kinds: {', '.join(found)}"
    row = {"what": what, "result": result, "wanted": "2,000 inputs: no traceback, no hang, no file outside the workdir"}
    (folder / "damaged-files.json").write_text(json.dumps(row))


def test_nothing_that_is_read_can_run_code():
    """No pickle, no eval, no exec anywhere; NumPy's files are read without objects, as is its default."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path in [*Path("lcx").rglob("*.py"), *Path("kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", "") or "")}
                assert not names & forbidden, path
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None)
                assert name not in ("eval", "exec", "compile", "__import__"), (path, node.lineno)
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), (path, node.lineno)


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert default_config() and not (tmp_path / "a.json").exists()
