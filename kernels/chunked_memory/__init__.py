"""Memories with a matrix state, computed chunk by chunk: Infini-attention's (Munkhdalai et al. 2024)."""

from lcx_kernels.chunked_memory.api import SegmentState, segment_memory, select_backend

__all__ = ["SegmentState", "segment_memory", "select_backend"]
