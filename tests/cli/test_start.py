"""How a process begins: with memory in huge pages where the kernel gives them to who asks, and once."""

import json
import os
import subprocess
import sys

import pytest

from lcx.cli.start import huge_pages

ASKED = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("tunables", "kernel_says", "expected"),
    [
        (None, ASKED, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", ASKED, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", ASKED, None),  # who says no is heard; and a process starts again only once
        (None, "[always] madvise never\n", None),
        (None, "", None),
    ],
)
def test_who_asks_for_huge_pages(tunables, kernel_says, expected):
    environment = {"HOME": "/"} | ({} if tunables is None else {"GLIBC_TUNABLES": tunables})
    found = huge_pages(environment, kernel_says)
    assert found == (None if expected is None else environment | {"GLIBC_TUNABLES": expected})


def test_the_same_command_line_in_the_same_process(tmp_path):
    """`python -X dev script.py a "b c"` starts again as just that, and keeps its process id."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from lcx.cli import start\n"
        "print(os.getpid(), flush=True)\n"
        f"start._kernel_says = lambda: {ASKED!r}\n"
        "start.main = lambda argv: print(json.dumps([argv, os.getpid(), sys.flags.dev_mode])) or 3\n"
        "sys.exit(start.start('verb'))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "dev", str(script), "a", "b c"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    before, again, last = done.stdout.splitlines()
    assert (done.returncode, before) == (3, again), done.stderr
    assert json.loads(last) == [["verb", "a", "b c"], int(before), True]
