"""Prints, at the end of a run, a table of the kernels that were compiled; keeps what was compiled out of the cache.

A test adds a row with ``record_property("row", {column: value})``; rows with the same columns form a table.
"""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Of these tests, which take up to a minute each, `.ci/run` takes the ones named here; the rest are `slow`.
FIRST = {
    "test_selective_scan_gpu.py::test_compiles_for_h100": ("130m-4k", "130m-256k"),
    "test_selective_scan_gpu.py::test_needs_of_each_kernel": ("130m-4k-90", "130m-4k-80", "130m-256k-90"),
    "test_selective_scan_gpu.py::test_needs_of_other_states": ("128-float32",),
    "test_attention_gpu.py::test_compiles_for_h100": ("documents-64", "ring-64"),
    "test_attention_gpu.py::test_needs_of_each_kernel": ("causal-64", "halo, documents-128"),
    "test_attention_gpu.py::test_needs_of_other_calls": ("64-float32-options0",),
    "test_attention_tpu.py::test_compiles": ("causal-v6e-128", "halo, documents, ragged-v5p-64"),
    "test_attention_tpu.py::test_other_calls_compile": ("64-float32-options0",),
    "test_chunked_memory_gpu.py::test_compiles_for_h100": ("Mamba-2 2.7B, 128k",),
    "test_chunked_memory_gpu.py::test_needs_of_each_kernel": (
        "Mamba-2 2.7B, 8k-90",
        "gated 128 x 128, 8k-90",
        "delta rule, 8k-90",
        "Infini delta, 64k-90",
    ),
    "test_chunked_memory_tpu.py::test_kinds": (
        "v5p-ssd 128 64, chunk 256",
        "v5p-delta rule 128 128, chunk 64",
        "v5p-infini delta 64 64, segment 256",
        "v6e-ssd 64 64, chunk 64",
        "v6e-linear 128 128, chunk 256",
        "v6e-gated 128 128, chunk 128",
        "v6e-infini 128 128, segment 2048",
    ),
    "test_chunked_memory_tpu.py::test_odd_shapes": ("odd widths and heads", "infini delta, wide values"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        first = FIRST.get(f"{item.path.name}::{getattr(item, 'originalname', '')}")
        if first is not None and item.callspec.id not in first:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _no_cache():
    """Programs for chips that are not here can be written to JAX's cache but not read from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_terminal_summary(terminalreporter):
    tables = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, row in report.user_properties:
            if name == "row":
                tables.setdefault(tuple(row), []).append([str(value) for value in row.values()])
    for columns, rows in tables.items():
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        terminalreporter.section("compiled kernels")
        for row in [columns, *rows]:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            terminalreporter.write_line("  ".join(cells).rstrip())
