"""Who may import whom. Read from the source, so that imports inside functions count as well."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BOTTOM = {"errors", "schema", "config", "files", "stages"}
BELOW_MODELS = BOTTOM | {"lcx_kernels", "parallel", "params", "layers", "mixers"}

# The room: what it may import of ours. Laws, training, evaluation, planning and interop never import each other;
# only cli imports data.
MAY_IMPORT = {
    "lcx_kernels": set(),
    "errors": set(),
    "schema": {"errors"},
    "config": {"errors", "schema"},
    "files": {"errors"},
    "stages": {"config"},
    "data": BOTTOM,
    "parallel": BOTTOM | {"lcx_kernels", "params"},
    "params": BOTTOM,
    "layers": BOTTOM | {"lcx_kernels", "parallel", "params"},
    "mixers": BOTTOM | {"lcx_kernels", "parallel", "params", "layers"},
    "models": BELOW_MODELS,
    "laws": BELOW_MODELS | {"models"},
    "training": BELOW_MODELS | {"models"},
    "evaluation": BELOW_MODELS | {"models"},
    "planning": BELOW_MODELS | {"models"},
    "interop": BELOW_MODELS | {"models", "__init__"},
    "benchmarks": BELOW_MODELS | {"models", "training", "planning"},
    "sweeps": BOTTOM,
    "cli": BELOW_MODELS
    | {"models", "laws", "training", "evaluation", "planning", "interop", "benchmarks", "sweeps", "data"}
    | {"__init__"},
    "__init__": set(),
    "scripts": {"cli"},
    "recipes": set(),
    "configs": {"errors", "config", "recipes"},
}
# The rooms that stay light, and all that they may import of others.
MAY_INSTALL = {
    "lcx_kernels": {"jax", "numpy", "triton", "jax_triton"},
    "errors": set(),
    "schema": set(),
    "config": {"ml_collections"},
    "recipes": {"ml_collections"},
    "configs": {"ml_collections"},
    "scripts": set(),
    "__init__": set(),
}

FILES = sorted(path for folder in ("lcx", "kernels", "configs", "scripts") for path in (ROOT / folder).rglob("*.py"))


def room_of(path):
    top, *rest = path.relative_to(ROOT).parts
    if top == "lcx":
        return rest[0].removesuffix(".py")
    return "lcx_kernels" if top == "kernels" else top


def imports_of(path):
    """Dotted names of what a file imports: `from a import b` is a.b, relative imports made absolute."""
    package = list(path.relative_to(ROOT).parts[:-1])
    package[:1] = ["lcx_kernels"] if package[0] == "kernels" else package[:1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def rooms_and_libraries(names):
    """What dotted names lead to: our rooms, and the top names of other packages."""
    rooms, libraries = set(), set()
    for name in names:
        top, *rest = name.split(".")
        if top == "lcx":
            known = rest and (rest[0] in MAY_IMPORT or (ROOT / "lcx" / rest[0]).exists())
            rooms.add(rest[0] if known else "__init__")
        elif top in MAY_IMPORT:
            rooms.add(top)
        elif top not in sys.stdlib_module_names:
            libraries.add(top)
    return rooms, libraries


def mentions(path, word):
    """Whether `word` is a name, an attribute or a part of an import in a file's code."""
    tree = ast.parse(path.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return word in used | {part for name in imports_of(path) for part in name.split(".")}


def names(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_point_down(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"a new room: say in this test what {room} may import"
    rooms, libraries = rooms_and_libraries(imports_of(path))
    assert rooms - {room} <= MAY_IMPORT[room]
    assert libraries <= MAY_INSTALL.get(room, libraries)


def test_shard_map_stays_in_one_room():
    assert {room_of(path) for path in FILES if mentions(path, "shard_map")} <= {"parallel"}


def test_flax_is_nnx_only():
    assert not [path for path in FILES if mentions(path, "linen")]


@pytest.mark.parametrize(
    ("place", "text", "rooms", "libraries"),
    [
        ("lcx/a.py", "from lcx.data.sources import x", {"data"}, set()),
        ("lcx/a.py", "def f():\n    import lcx.cli.main as m", {"cli"}, set()),
        ("lcx/a.py", "from lcx import data, __version__", {"data", "__init__"}, set()),
        ("lcx/layers/a.py", "from ..models import stack", {"models"}, set()),
        ("kernels/attention/a.py", "from . import api\nfrom ..backends import b", {"lcx_kernels"}, set()),
        ("configs/a.py", "import os, jax.numpy as jnp\nfrom flax import nnx", set(), {"jax", "flax"}),
    ],
)
def test_imports_are_found_however_they_are_written(tmp_path, monkeypatch, place, text, rooms, libraries):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert rooms_and_libraries(imports_of(path)) == (rooms, libraries)


@pytest.mark.parametrize(
    "text", ["jax.shard_map(f)", "from jax import shard_map as s", "from jax.experimental.shard_map import x"]
)
def test_mentions_are_found_however_they_are_written(tmp_path, monkeypatch, text):
    path = tmp_path / "lcx" / "a.py"
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert mentions(path, "shard_map")
