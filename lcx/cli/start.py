"""Where a process of lcx begins: `scripts/NAME.py` and the command `lcx`.

XLA asks for the memory of a step anew for each step, in blocks of hundreds of megabytes, and the first touch of every
4 KiB page of them is a fault. In pages of 2 MiB these are 200 times fewer: 7 to 13% of a step on CPU
(docs/performance.md). glibc asks for huge pages if its environment says so when the process starts, and only then.
"""

import os
import sys

from lcx.cli.main import main

HUGE_PAGES = "glibc.malloc.hugetlb"
KERNEL_SAYS = "/sys/kernel/mm/transparent_hugepage/enabled"


def start(*verb: str) -> int:
    """Runs the process's command line, after `verb` where that is not part of it; returns the exit code."""
    environment = huge_pages(dict(os.environ), _kernel_says())
    if environment is not None and sys.executable:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return main([*verb, *sys.argv[1:]])


def huge_pages(environment: dict[str, str], kernel_says: str) -> dict[str, str] | None:
    """The environment in which glibc asks for huge pages; None where it is that already, or would change nothing.

    kernel_says: "always [madvise] never": whether pages are huge always, if asked for, or never.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES in tunables or "[madvise]" not in kernel_says:
        return None
    return environment | {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))}


def _kernel_says() -> str:
    try:
        with open(KERNEL_SAYS) as file:
            return file.read()
    except OSError:  # not Linux, or a kernel without them
        return ""
