"""Pretraining of hybrid long-context language models in JAX.

`lcx.train(config, workdir)` trains, `lcx.load(path)` gives a trained model and its tokenizer; both are imported when
they are first asked for, so that reading a config costs milliseconds.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {"train": "lcx.cli.train", "load": "lcx.cli.load"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lcx' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
