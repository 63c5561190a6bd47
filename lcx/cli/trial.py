"""`python -m lcx.cli.trial`: one trial of a sweep, which is `lcx train`, and never outlives the sweep.

The last thing that it writes is usage.json in the workdir: what memory it took, as far as that is known.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lcx.cli.flags import CONFIG, WORKDIR, Flag, parse
from lcx.cli.main import run
from lcx.cli.train import main as train
from lcx.errors import UserError
from lcx.files import read_json, write_json

SUMMARY = "Trains a trial of a sweep."
PARENT = Flag("parent", "the process of the sweep, which ends this one with itself; 0: none", int, 0)
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def main(argv: Sequence[str]) -> int:
    """Runs the trial; returns the exit code."""
    values = parse("trial", SUMMARY, [CONFIG, WORKDIR, PARENT], argv)
    if values.parent:
        end_with(values.parent)
    code = train([f"--config={values.config}", f"--workdir={values.workdir}"])
    if code == 0:
        write_usage(Path(values.workdir) / "usage.json")
    return code


def end_with(parent: int) -> None:
    """Has this process killed when `parent` ends, however that ends. A run may be killed at any moment."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def write_usage(path: Path) -> None:
    """Peak memory of the process, and of its devices where they say; the largest of all attempts."""
    import jax

    scale = 1 if sys.platform == "darwin" else 1024
    usage = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "device_bytes": None}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if any(peaks):
        usage["device_bytes"] = max(filter(None, peaks))
    with contextlib.suppress(OSError, UserError):
        before = read_json(path)
        usage = {name: max(filter(None, (value, before.get(name))), default=None) for name, value in usage.items()}
    write_json(path, usage)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
