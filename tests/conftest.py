"""Set once, before JAX is imported: eight CPU devices, quick compilation, a cache, reproducible draws.

Of XLA's code generators for CPU the tests take the older one, without optimisation: it compiles several times faster.
The runs of tests/drills are processes of their own and use what users get.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

from hypothesis import HealthCheck, settings

CACHE = Path(__file__).parent.parent / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest -m gpu, where there is one
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax") < "0.11":  # later ones have one generator, and end at a flag they do not know
    FLAGS += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # programs need not know which line made them
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# What compiled once is read again by the next run; a cache that cannot be written or read is only slower.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_RAISE_PERSISTENT_CACHE_ERRORS", "false")

# Tracing makes very many small objects and hardly a cycle: looking for cycles as often as usual takes a tenth longer.
gc.set_threshold(50_000, 20, 50)

# Compilation has no deadline; the same draws in every run, so that a red run can be repeated.
settings.register_profile(
    "lcx", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lcx")


# Compiled programs are mapped into memory, some ten mappings each, and stay; Linux gives a process 65,530, and XLA ends
# with a segmentation fault where it gets no more.
MAPPINGS = 15_000


def pytest_runtest_teardown(item):
    """Lets go of all compiled programs when there are many."""
    mappings = Path("/proc/self/maps")
    if item.get_closest_marker("mesh") and mappings.exists() and mappings.read_bytes().count(b"\n") > MAPPINGS:
        import jax  # not before the variables above are set

        jax.clear_caches()
        gc.collect()


def pytest_terminal_summary(terminalreporter):
    """The largest deviation of each kind that tests have recorded: what was compared, in which dtype, how far it is."""
    worst = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "deviation":
                what, dtype, found = value
                worst[what, dtype] = max(worst.get((what, dtype), 0.0), found)
    if worst:
        terminalreporter.section("largest deviations")
    for (what, dtype), found in sorted(worst.items()):
        terminalreporter.write_line(f"{what}, {dtype}: {found:.1e}")
