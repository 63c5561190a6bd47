import json
import os
import resource

import pytest

from lcx.errors import UserError
from lcx.files import is_local, read_json, write_bytes, write_json


def test_written_values_are_read(tmp_path):
    path = tmp_path / "new" / "folder" / "values.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"format_version": 1, "a": [1, 2.5, None]}
    assert read_json(path) == {"a": [1, 2.5, None]}
    assert os.listdir(path.parent) == ["values.json"]


@pytest.mark.parametrize("act", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, act):
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk on fire")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk on fire|File too large"):
        if act == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a part of it can be written
        else:
            patch.setattr(os, act, fail)
        try:
            write_json(path, {"a": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3} and os.listdir(tmp_path) == ["values.json"]


def test_the_data_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    acts = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (acts.append(name), original(*a))[1])
    write_bytes(tmp_path / "file", b"data")
    assert acts == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"3", b"\xff", b"{}", b'{"format_version": 2}', b"[" * 100_000])
def test_what_is_not_ours_is_a_sentence(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match="file "):
        read_json(tmp_path / "file")


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", {"a": float("nan")})
    assert not (tmp_path / "file").exists()


def test_object_storage_is_not_local():
    assert is_local("/a/b") and is_local("relative") and not is_local("gs://bucket/run")
