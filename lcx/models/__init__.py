"""Models made of mixers."""

from lcx.models.language_model import LanguageModel

__all__ = ["LanguageModel"]
