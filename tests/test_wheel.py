"""The wheel: both packages whole, no top-level `kernels`, and a command that works away from the source."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="building needs setuptools 77 (the test extra has it)"
)


def run(*words, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the source and nothing old is taken up."""
    source = tmp_path_factory.mktemp("source")
    for name in ("lcx", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--no-build-isolation", "--wheel-dir", out, source),
    )
    (wheel,) = out.glob("lcx-*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an empty environment with the wheel; dependencies are this environment's, by a .pth file."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", wheel),
    )
    # addsitedir would run the .pth files found there, this project's editable install among them; a bare path does not.
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_every_file_is_in_the_wheel(wheel):
    files = [path for name in ("lcx", "kernels") for path in (ROOT / name).rglob("*") if path.is_file()]
    sources = {path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts}
    expected = {re.sub("^kernels/", "lcx_kernels/", path.as_posix()) for path in sources}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_every_folder_is_a_package():
    folders = {path.parent for name in ("lcx", "kernels") for path in (ROOT / name).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_both_packages_are_imported_from_the_wheel(python, tmp_path):
    code = """
import importlib.util, lcx, lcx.config, lcx_kernels
print(lcx.__version__, lcx.__file__, lcx_kernels.__file__, importlib.util.find_spec("kernels"), sep="\\n")
"""
    number, *files, kernels = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert number == version("lcx")
    assert all(Path(file).is_relative_to(python.parents[1]) for file in files)
    assert kernels == "None"


def test_the_command_works(python, tmp_path):
    assert "--workdir" in run(python.parent / "lcx", "train", "--help", cwd=tmp_path)
