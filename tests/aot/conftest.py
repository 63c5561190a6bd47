"""Prints, at the end of a run, a table of the kernels that were compiled; keeps what was compiled out of the cache.

A test adds a row with ``record_property("row", {column: value})``; rows with the same columns form a table.
"""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


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
