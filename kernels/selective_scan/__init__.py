"""The selective scan of Mamba (Gu and Dao, 2023, arXiv 2312.00752), forward and backward."""

from lcx_kernels.selective_scan.api import ScanSummary, selective_scan, selective_scan_summary

__all__ = ["ScanSummary", "selective_scan", "selective_scan_summary"]
