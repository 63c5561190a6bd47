"""Choosing the backend of a kernel: by platform, or the one the caller named."""

from collections.abc import Callable, Mapping

import jax

# Every name that a kernel of this package may offer; a kernel need not offer all.
BACKENDS = ("reference", "xla", "pallas_tpu", "triton")


class BackendUnavailable(RuntimeError):
    """A backend that exists by name cannot run here; the message says what is missing."""


def resolve_backend(backend: str, available: Mapping[str, Callable], auto: Mapping[str, str]) -> str:
    """Return the name of the backend to run.

    Args:
      backend: "auto", or the name of a backend.
      available: the kernel's implementations by name.
      auto: what "auto" means on each platform, platforms named as by ``jax.default_backend()`` ("cpu", "gpu", "tpu").

    Raises:
      ValueError: ``backend`` is not a name of ``BACKENDS``.
      BackendUnavailable: this kernel does not have that backend, or nothing is chosen for this platform.
    """
    choices = ", ".join(available)
    if backend == "auto":
        platform = jax.default_backend()
        if platform not in auto:
            raise BackendUnavailable(f'no default backend for platform "{platform}"; name one of: {choices}')
        return auto[platform]
    if backend not in BACKENDS:
        raise ValueError(f'backend: unknown name {backend!r}, expected "auto" or one of: {choices}')
    if backend not in available:
        raise BackendUnavailable(f'backend "{backend}" is missing for this kernel; it has: {choices}')
    return backend
