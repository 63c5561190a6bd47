"""Choosing the backend of a kernel: by platform, or the one the caller named."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping

import jax

# Every name that a kernel of this package may offer, and the platform that it needs; a kernel need not offer all.
BACKENDS = {"reference": None, "xla": None, "cpp": "cpu", "pallas_tpu": "tpu", "triton": "gpu", "cudnn": "gpu"}

_target = contextvars.ContextVar("target", default=None)
_interpreted = contextvars.ContextVar("interpreted", default=False)


class BackendUnavailable(RuntimeError):
    """A backend that exists by name cannot run here; the message says what is missing."""


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces kernels for "tpu" or "gpu" (or "cpu") whatever this machine has: programs that are compiled ahead of time.

    What is traced inside is not valid outside: jit a function anew, or lower it inside.
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Lets Pallas kernels be named anywhere: they run in interpret mode, slowly, for tests of their arithmetic."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether a Pallas kernel that is traced now is to be interpreted."""
    return _interpreted.get()


def target_platform() -> str:
    """The platform that programs are traced for: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


def resolve_backend(backend: str, available: Mapping[str, Callable], auto: Mapping[str, str | Callable]) -> str:
    """Return the name of the backend to run.

    Args:
      backend: "auto", or the name of a backend.
      available: the kernel's implementations by name.
      auto: what "auto" means on each platform, platforms named as by ``jax.default_backend()`` ("cpu", "gpu", "tpu"):
        a name, or a function that finds it.

    Raises:
      ValueError: ``backend`` is not a name of ``BACKENDS``.
      BackendUnavailable: this kernel does not have that backend, it needs another platform, or nothing is chosen for
        this one.
    """
    choices, platform = ", ".join(available), target_platform()
    if backend == "auto":
        if platform not in auto:
            raise BackendUnavailable(f'no default backend for platform "{platform}"; name one of: {choices}')
        found = auto[platform]
        return found() if callable(found) else found
    if backend not in BACKENDS:
        raise ValueError(f'backend: unknown name {backend!r}, expected "auto" or one of: {choices}')
    if backend not in available:
        raise BackendUnavailable(f'backend "{backend}" is missing for this kernel; it has: {choices}')
    needed = BACKENDS[backend]
    if needed not in (None, platform) and not (backend == "pallas_tpu" and is_interpreted()):
        raise BackendUnavailable(f'backend "{backend}" needs a {needed.upper()}, and this platform is "{platform}"')
    return backend
