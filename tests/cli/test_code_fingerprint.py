"""What several processes compare of their code."""

import shutil
from pathlib import Path
from types import ModuleType

import lcx
from lcx.cli.run import code_fingerprint


def copy(folder: Path) -> ModuleType:
    """The package's files there, as a module that is not imported."""
    shutil.copytree(Path(lcx.__file__).parent / "models", folder / "lcx")
    package = ModuleType("lcx")
    package.__file__ = str(folder / "lcx" / "__init__.py")
    return package


def test_two_checkouts_are_the_same_or_not(tmp_path):
    here, there = copy(tmp_path / "a"), copy(tmp_path / "b")
    assert code_fingerprint([here]) == code_fingerprint([there])
    file = Path(there.__file__).parent / "stack.py"
    file.write_text(file.read_text() + "\n")
    assert code_fingerprint([here]) != code_fingerprint([there])
    file.rename(file.with_name("other.py"))
    Path(here.__file__).with_name("stack.py").write_bytes(file.with_name("other.py").read_bytes())
    assert code_fingerprint([here]) != code_fingerprint([there])  # the same bytes in a file of another name
