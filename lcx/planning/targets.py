"""Devices that are not here, and the compilers for them: libtpu, and XLA's compiler for GPUs without a GPU."""

import contextlib
import importlib.util
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import topologies

from lcx.errors import UserError
from lcx.planning.hardware import Hardware

# What XLA has to be told of a GPU that is not here, in the text form of its GpuTargetConfigProto.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
GPU_TARGETS = {
    "h100": HOPPER.format(bandwidth=3_352_320_000_000, memory=84_929_347_584, name="NVIDIA H100 80GB HBM3"),
    "h200": HOPPER.format(bandwidth=4_800_000_000_000, memory=150_754_820_096, name="NVIDIA H200"),
}
# Modules that the compiler of a platform is in, and the package of each.
COMPILERS: Mapping[str, Mapping[str, str]] = {
    "tpu": {"libtpu": "libtpu"},
    "gpu": {"jax_cuda13_plugin": "jax-cuda13-plugin and jax-cuda13-pjrt", "jax_triton": "jax-triton"},
    "cpu": {},
}
# Nothing is run, so nothing can be tuned.
COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = {"tpu": {}, "gpu": {"xla_gpu_autotune_level": "0"}, "cpu": {}}


def prepare(hardware: Hardware) -> None:
    """Sets what the compiler reads from the environment; to be called before JAX has made any device.

    Raises UserError where the compiler is not installed, naming the package.
    """
    for module, package in COMPILERS[hardware.platform].items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--hardware={hardware.name}: its compiler is not installed: pip install {package}.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no question to a TPU machine's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: processes may compile side by side
    for name, value in (("jax_platforms", "cpu"), ("jax_num_cpu_devices", _cpu_devices(hardware))):
        with contextlib.suppress(RuntimeError):  # JAX has been started, with the devices that it has
            jax.config.update(name, value)


def devices_of(hardware: Hardware) -> Sequence[jax.Device]:
    """The devices, to make a mesh of and to compile for. Raises UserError where there is no such topology."""
    if hardware.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < hardware.devices:
            raise UserError(
                f"--hardware={hardware.name}: JAX has been started with {len(found)} CPU devices: run `lcx plan` as a "
                "process of its own."
            )
        return found[: hardware.devices]
    try:
        if hardware.platform == "gpu":
            nodes, gpus = hardware.shape
            description = topologies.get_topology_desc(
                hardware.kind,
                platform="cuda",
                target_config=GPU_TARGETS[hardware.kind],
                topology=f"1x{nodes}x{gpus}",
            )
        else:
            alone = {"chips_per_host_bounds": (1, 1, 1)} if hardware.devices == 1 else {}
            description = topologies.get_topology_desc(hardware.name, platform="tpu", **alone)
    except Exception as error:  # XLA's, of several types
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"--hardware={hardware.name}: the compiler knows no such topology: {reason}.") from error
    return description.devices


def _cpu_devices(hardware: Hardware) -> int:
    return hardware.devices if hardware.platform == "cpu" else 1
