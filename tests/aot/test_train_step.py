"""Whole train steps, compiled for meshes that are not here: they fit, and move what they should between chips.

`.ci/run` takes the small ones; `make aot` also the sizes that people train.
"""

import math
import re
import time

import jax
import pytest
from jax.experimental import topologies

from lcx.config import MESH_AXES, Config, load_config
from lcx.parallel.mesh import make_mesh
from lcx.training.trainer import lower_step, make_program
from lcx_kernels.backends import compiling_for
from tests.aot import gpu_targets
from tests.aot import topologies as chips

pytestmark = pytest.mark.aot

GIB = 2**30
V5P, H100 = 95e9, 80e9  # bytes of memory of a chip
SMALL = {"d_model": 256, "vocab_size": 1024, "compute_dtype": "bfloat16", "periods": 2}
LARGE = {
    "SAMBA 1.3B, 256K": ("samba.py:size=1.3b,sequence_length=262144", "v5p:4x4x4", {"fsdp": 8, "seq": 8}, 8),
    "Transformer++ 1.3B, 1M": (
        "transformer.py:size=1.3b,sequence_length=1048576",
        "v5p:8x8x8",
        {"fsdp": 4, "seq": 128},
        4,
    ),
}


def config(file: str, mesh: dict, batch_size: int, **model) -> Config:
    values = load_config(f"configs/{file}")
    with values.unlocked():
        values.model.update({"compute_dtype": "bfloat16"} | model)
        values.train.update(batch_size=batch_size)
        values.mesh.update(dict.fromkeys(MESH_AXES, 1) | mesh)
    return Config.from_dict(values)


def compile_step(config: Config, devices: list, platform: str, options: dict | None = None) -> jax.stages.Compiled:
    with compiling_for(platform):
        program = make_program(config, make_mesh(config.mesh, devices))
        return lower_step(program).compile(compiler_options=options)


def tpus(topology: str) -> list:
    chips.tpu_mesh("v5p")  # skips where there is no compiler
    return topologies.get_topology_desc(topology, platform="tpu").devices


def samba(length: int) -> str:
    """The text of a small SAMBA's compiled step on eight chips."""
    heads = {"type": "attention", "num_heads": 2, "num_kv_heads": 2, "window": 512}
    mixers = {"mamba": {"type": "mamba"}, "swa": heads}
    small = SMALL | {"mixers": mixers, "pattern": "mamba swa", "remat": {"mamba": "full", "swa": "full"}}
    file = f"samba.py:sequence_length={length}"
    return compile_step(config(file, {"fsdp": 2, "seq": 4}, 2, **small), tpus("v5p:2x2x2"), "tpu").as_text()


def test_a_samba_layer_moves_no_sequence():
    """No gather of an activation along time; what is passed on is as large at twice the length."""
    short, long = 8192, 16384
    texts = {length: samba(length) for length in (short, long)}
    for length, text in texts.items():
        gathered = [shape for kind, shape in collectives(text) if kind.startswith(("all-gather", "all-to-all"))]
        assert gathered, "fsdp gathers weights"
        assert not [shape for shape in gathered if length in dimensions(shape) or 2 * length in dimensions(shape)]
    passed = {
        length: sorted(bytes_of(shape) for kind, shape in collectives(text) if kind == "collective-permute-start")
        for length, text in texts.items()
    }
    assert passed[short] and passed[short] == passed[long]


def test_the_ring_computes_while_keys_travel():
    """Between a permute's start and its end, in both passes, something is computed."""
    heads = {"type": "attention", "num_heads": 2, "num_kv_heads": 2}
    small = SMALL | {"mixers": {"attention": heads}, "pattern": "attention", "remat": {}}
    step = config("transformer.py:sequence_length=8192", {"fsdp": 2, "seq": 4}, 2, **small)
    text = compile_step(step, tpus("v5p:2x2x2"), "tpu").as_text()
    rings = [lines for lines in loops(text) if has(lines, "tpu_custom_call") and not has(lines, r" while\(")]
    assert len(rings) == 2  # forward and backward
    for lines in rings:
        travels = [span for span in permutes(lines) if bytes_of(lines[span[0]]) >= 2**16]  # not documents' numbers
        assert len(travels) == (2 if lines is min(rings, key=len) else 4)  # keys and values; and their gradients
        for start, done in travels:
            assert has(lines[start:done], r" (fusion|custom-call)\("), lines[start]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_what_people_train_fits(name, record_property):
    file, topology, mesh, batch_size = LARGE[name]
    devices, start = tpus(topology), time.perf_counter()
    compiled = compile_step(config(file, mesh, batch_size), devices, "tpu")
    report(record_property, name, topology, mesh, compiled, time.perf_counter() - start, V5P)


@pytest.mark.slow
def test_samba_on_eight_h100(record_property):
    gpu_targets.h100_mesh()  # skips where there is no compiler
    devices = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=gpu_targets.H100, topology="1x8x1"
    ).devices
    mesh = {"fsdp": 2, "seq": 4}
    step = config("samba.py:size=421m,sequence_length=32768", mesh, 8)
    step.model.mixers["swa"]["backend"] = "triton"  # cuDNN is not here
    start = time.perf_counter()
    compiled = compile_step(step, devices, "gpu", gpu_targets.COMPILER_OPTIONS)
    report(record_property, "SAMBA 421M, 32K", "8 H100", mesh, compiled, time.perf_counter() - start, H100)


def report(record_property, name: str, chips: str, mesh: dict, compiled, seconds: float, memory: float) -> None:
    needs = compiled.memory_analysis()
    state, work = needs.argument_size_in_bytes, needs.temp_size_in_bytes
    row = {"train step": name, "chips": chips, "mesh": " ".join(f"{axis}={size}" for axis, size in mesh.items())}
    row |= {"state, GiB": f"{state / GIB:.2f}", "temporaries, GiB": f"{work / GIB:.2f}", "seconds": f"{seconds:.0f}"}
    record_property("row", row)
    assert state + work < memory


# Reading the compiler's text.

SHAPE = re.compile(r"(pred|bf16|[suf]\d+)\[([\d,]*)\]")
WIDTH = {"pred": 1, "bf16": 2}


def collectives(text: str) -> list[tuple[str, str]]:
    """(kind, the shape of its result) of each exchange between chips."""
    kinds = r"((?:all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?)\("
    return [(match[2], match[1]) for match in re.finditer(rf"= (.*?) {kinds}", text)]


def dimensions(shape: str) -> set[int]:
    return {int(size) for _, sizes in SHAPE.findall(shape) for size in sizes.split(",") if size}


def bytes_of(shape: str) -> int:
    """Of the first array in a shape or a line."""
    kind, sizes = SHAPE.search(shape).groups()
    width = WIDTH.get(kind) or int(kind[1:]) // 8
    return width * math.prod(int(size) for size in sizes.split(",") if size)


def loops(text: str) -> list[list[str]]:
    """The instructions of each loop's body, in the order in which they are issued."""
    blocks = re.split(r"\n(?=%?[\w.]+ \(.*\{\n|%[\w.]+ \(|ENTRY)", text)
    bodies = set(re.findall(r" body=(%[\w.\-]+)", text))
    return [block.splitlines()[1:] for block in blocks if block.split(" ", 1)[0] in bodies]


def permutes(lines: list[str]) -> list[tuple[int, int]]:
    """Where each permute begins and ends."""
    started, spans = {}, []
    for place, line in enumerate(lines):
        if match := re.match(r"\s*(%collective-permute-start\S*) =", line):
            started[match[1]] = place
        if match := re.search(r"collective-permute-done\((%collective-permute-start[\w.]*)\)", line):
            spans.append((started[match[1]], place))
    return spans


def has(lines: list[str], pattern: str) -> bool:
    return any(re.search(pattern, line) for line in lines)
