"""The selective scan of Mamba (Gu and Dao, 2023, arXiv 2312.00752), forward and backward."""

from lcx_kernels.selective_scan.api import ScanSummary, select_backend, selective_scan, selective_scan_summary

__all__ = ["ScanSummary", "select_backend", "selective_scan", "selective_scan_summary"]
