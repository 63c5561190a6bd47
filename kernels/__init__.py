"""Sequence kernels in JAX: pure functions of arrays, each with a choice of backends.

Every kernel is a package here. It takes ``backend="auto"``, which picks by platform, or a backend's name, which is used
or refused, never replaced in silence. Nothing but JAX is needed.
"""
