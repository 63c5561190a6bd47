"""Kernels in C++ for CPUs, called through XLA's foreign function interface.

A kernel's source is compiled when a program first needs it, for the machine at hand, by the C++ compiler that is there
(``CXX``, or c++, g++, clang++), and kept in the user's cache. So nothing is compiled at installation, and without a
compiler the other backends go on.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from lcx_kernels.backends import BackendUnavailable

VECTOR_BYTES = 64  # of the vectors that kernels compute with, on any machine
_SHARED = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
_SECONDS = 300  # that a compilation may take


class Source(NamedTuple):
    """A file of kernels.

    Attributes:
      path: from this package's folder, "selective_scan/cpp_kernels.cc".
      handlers: the names of its calls.
    """

    path: str
    handlers: tuple[str, ...]

    def missing(self) -> str | None:
        """Why they cannot run here, or None: they are compiled now, if they were not, and known to XLA."""
        return _outcome(self)

    def default(self) -> str:
        """The backend that "auto" means on a CPU: "cpp", or, with a warning that says why once, "xla"."""
        reason = self.missing()
        if reason:
            _warn_once(reason)
        return "xla" if reason else "cpp"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f'backend "cpp" {reason}; XLA\'s own, slower code takes its place', stacklevel=2)


@functools.cache
def _outcome(source: Source) -> str | None:
    """None once the handlers are registered, or what is in the way; asked once in a process."""
    try:
        begun = _begin_all().get(source.path)
        library = ctypes.cdll.LoadLibrary(str(begun.result() if begun else _build(source.path)))
    except (BackendUnavailable, OSError) as error:
        return str(error)
    for name in source.handlers:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


@functools.cache
def _begin_all() -> dict[str, Future]:
    """The libraries of all sources of this package, side by side: a model that needs one mostly needs others soon."""
    paths = sorted(path.relative_to(_SHARED.parent).as_posix() for path in _SHARED.parent.glob("*/*.cc"))
    threads = ThreadPoolExecutor(max_workers=len(paths))
    return {path: threads.submit(_build, path) for path in paths}


def _build(source: str) -> Path:
    """The shared library of a source: from the cache, or compiled now."""
    path = _SHARED.parent / source
    compiler = _compiler()
    library = _cache() / f"{path.parent.name}-{_fingerprint(path, compiler)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *_FLAGS, f"-I{_SHARED}", f"-I{jax.ffi.include_dir()}", str(path), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise BackendUnavailable(f"could not be compiled by {compiler}: {lines[0]}")
            os.replace(made, library)  # whole or not at all, whoever else compiles the same
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailable(f"could not be compiled by {compiler}: {error}") from error
    return library


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BackendUnavailable("needs a C++ compiler: c++, g++ or clang++ on the path, or CXX")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcx" / "cpp"


def _fingerprint(path: Path, compiler: str) -> str:
    """Of all that the machine code depends on: sources, flags, compiler, XLA's interface and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [compiler, version, " ".join(_FLAGS), jax.__version__, platform.machine(), _processor()]
    sources = [path, *sorted(_SHARED.glob("*.h"))]
    return hashlib.sha256("\0".join([*parts, *(file.read_text() for file in sources)]).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do, where the system says so: a home folder may be that of several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
