"""Memories with a matrix state, computed chunk by chunk: linear attention, SSD, the delta rule, Infini-attention."""

from lcx_kernels.chunked_memory.api import chunked_memory
from lcx_kernels.chunked_memory.choice import select_backend
from lcx_kernels.chunked_memory.state import SegmentState
from lcx_kernels.chunked_memory.summary import MemorySummary, chunked_memory_summary

__all__ = ["MemorySummary", "SegmentState", "chunked_memory", "chunked_memory_summary", "select_backend"]
