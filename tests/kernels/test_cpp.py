"""How kernels in C++ come to be there: compiled once, kept, and never missed in silence."""

import subprocess
import warnings
from concurrent.futures import wait

import pytest

from lcx_kernels import cpp
from lcx_kernels.backends import BackendUnavailable
from lcx_kernels.selective_scan import select_backend


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has asked for no kernel yet, of a user whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)

    def forget():
        if cpp._begin_all.cache_info().currsize:
            wait(cpp._begin_all().values())  # what still compiles would be seen by the next test
        for memory in (cpp._begin_all, cpp._outcome, cpp._warn_once):
            memory.cache_clear()

    forget()
    yield monkeypatch
    forget()


def test_without_a_compiler_xla_takes_over_and_says_so(fresh, tmp_path):
    fresh.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler.*slower"):
        assert select_backend("auto") == "xla"
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert select_backend("auto") == "xla"
    with pytest.raises(BackendUnavailable, match=r'"cpp" cannot do this call: needs a C\+\+ compiler'):
        select_backend("cpp")


def test_what_the_compiler_says_is_passed_on(fresh, tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("int main( { }\n")
    reason = cpp.Source(str(source), ("nothing",)).missing()
    assert "could not be compiled by" in reason and "broken.cc:1" in reason and "\n" not in reason


def test_a_folder_that_cannot_be_written_is_named(fresh, tmp_path):
    (tmp_path / "cache").write_text("a file")
    reason = cpp.Source("causal_conv/cpp_kernels.cc", ()).missing()
    assert "could not be compiled" in reason and str(tmp_path / "cache") in reason


def test_a_source_is_compiled_once(fresh, tmp_path):
    source = tmp_path / "kernel.cc"
    source.write_text("// one\n")
    first = cpp._build(str(source))
    compiled = []

    def run(command, **options):
        compiled.extend([command] if "-o" in command else [])
        return call(command, **options)

    call = subprocess.run
    fresh.setattr(subprocess, "run", run)
    assert cpp._build(str(source)) == first and not compiled
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    source.write_text("// two\n")
    assert cpp._build(str(source)) != first and len(compiled) == 1
