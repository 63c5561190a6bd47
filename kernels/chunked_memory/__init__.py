"""Memories with a matrix state, computed chunk by chunk: linear attention, SSD, the delta rule, Infini-attention."""

from lcx_kernels.chunked_memory.api import chunked_memory
from lcx_kernels.chunked_memory.choice import select_backend
from lcx_kernels.chunked_memory.state import SegmentState

__all__ = ["SegmentState", "chunked_memory", "select_backend"]
