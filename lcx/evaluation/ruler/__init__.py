"""RULER's thirteen tasks (Hsieh et al., arXiv 2404.06654), generated to exact lengths from local text."""

from lcx.evaluation.ruler.generate import Sample, make_sample
from lcx.evaluation.ruler.tasks import TASKS, Sources

__all__ = ["TASKS", "Sample", "Sources", "make_sample"]
