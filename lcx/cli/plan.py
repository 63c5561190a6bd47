"""`lcx plan`: compiles a config's train step for hardware that is not here, and says what it will take."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from etils import epath

from lcx.cli.flags import CONFIG, Flag, parse, read_config
from lcx.cli.verify import parse_mesh
from lcx.config import Config
from lcx.errors import UserError
from lcx.files import write_json

if TYPE_CHECKING:
    from lcx.planning.hardware import Hardware
    from lcx.planning.plan import Compiled, Plan
    from lcx.training.trainer import Program

SUMMARY = """\
Compiles the train step of a config for hardware that need not be here, with that hardware's own compiler, and says
whether it fits, what it needs and what it sends; and, from published rates, an estimate of its time. Writes plan.json.
Exit code 0 whether it fits or not."""
FLAGS = [
    CONFIG,
    Flag("hardware", "v5p:4x4x4, v5e:4x8, v6e:16x16, h100:8, h100:8x16 (sixteen nodes), cpu:8", required=True),
    Flag("workdir", "the folder for plan.json, that of a run or any other", required=True),
    Flag("mesh", "devices along the axes instead of the config's, those left out being 1: fsdp=8,seq=8"),
    Flag("search", "compiles the most promising meshes and remat policies, and ranks them", bool, False),
    Flag("largest", "finds the largest batch and sequence by compiling them, some minutes each", bool, False),
]
# What a compiler says of a program that does not fit: all bytes, or those besides the arguments.
_TOO_LARGE = re.compile(
    r"(?P<all>[Uu]sed (?P<used>[\d.]+)(?P<u>[KMGT]?)i?B? of [\d.]+\w* hbm)"
    r"|required for HLO temporaries \((?P<working>[\d.]+)(?P<w>[KMGT]?)i?B?\) exceeds available HBM"
)
MOST_COMPILED = 6  # candidates of a search
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("plan", SUMMARY, FLAGS, argv)
    config = Config.from_dict(read_config(values))
    if values.mesh:
        config = replace(config, mesh=parse_mesh(values.mesh, config.mesh))
    from lcx.planning.hardware import parse_hardware
    from lcx.planning.targets import prepare

    hardware = parse_hardware(values.hardware)
    folder = epath.Path(values.workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before minutes are spent
        prepare(hardware)
        with progress() as say:
            result = plan_all(config, hardware, values.search, values.largest, say)
        write_json(folder / "plan.json", result)
    except OSError as error:
        raise UserError(f"the workdir {values.workdir} cannot be written: {error.strerror}.") from None
    print(f"plan: {folder / 'plan.json'}")
    return 0


def plan_all(
    config: Config, hardware: "Hardware", search: bool, largest: bool, say: Callable[[str], None]
) -> dict[str, object]:
    """Plans, prints what came of it, and returns it for JSON."""
    from lcx.cli.plan_table import largest_line, ranking, table
    from lcx.planning.largest import by_compiling, in_proportion

    candidates = []
    if search:
        candidates = plan_candidates(config, hardware, say)
        print(ranking(candidates))
    best = candidates[0] if candidates else plan_config(config, hardware, say)
    print(table(best))
    step = unit_of(best)
    if largest:
        compile_other = lambda **train: plan_config(with_train(best.config, **train), hardware, say)  # noqa: E731
        found = by_compiling(best, step, compile_other)
    else:
        found = in_proportion(best, step)
    print(largest_line(found))
    ranked = [candidate.to_dict() for candidate in candidates]
    return best.to_dict() | {"largest": found} | ({"candidates": ranked} if search else {})


def plan_config(config: Config, hardware: "Hardware", say: Callable[[str], None]) -> "Plan":
    """Compiles one config and reads off what it takes."""
    import jax

    from lcx.cli.dry_run import device_bytes
    from lcx.parallel.mesh import make_mesh
    from lcx.planning.plan import make_plan
    from lcx.planning.targets import devices_of
    from lcx.training.trainer import make_programs
    from lcx_kernels.backends import compiling_for

    with compiling_for(hardware.platform):
        config, notes = for_hardware(config, hardware)
        mesh = make_mesh(config.mesh, devices_of(hardware))
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
        programs = make_programs(config, mesh)
        program = max(programs, key=lambda one: (tokens_of(one), one.config.train.sequence_length))
        if len(programs) > 1:
            notes.append(f"of {len(programs)} stages this is number {program.stage.number}, the largest")
        train = program.config.train
        shape = f"{train.batch_size} rows of {train.sequence_length:,} tokens"
        say(f"compiling for {hardware.name}, {axes}, {shape} (minutes for a large model)")
        size = lambda tree: sum(map(device_bytes, jax.tree.leaves(tree)))  # noqa: E731
        state = program.abstract
        compiled = compile_step(program, hardware, size(state) + batch_bytes(program))
        bytes_of = {"parameters": size(state.params), "optimizer": size(state.opt_state)}
        plan = make_plan(program.config, hardware, dict(mesh.shape), compiled, bytes_of)
    plan.notes.extend(notes)
    return plan


def tokens_of(program: "Program") -> int:
    """Of a step."""
    return program.config.train.batch_size * program.config.train.sequence_length


def batch_bytes(program: "Program") -> int:
    """Bytes of a batch on one device."""
    train = program.config.train
    shapes = {1: (train.batch_size,), 2: (train.batch_size, train.sequence_length)}
    pieces = [sharding.shard_shape(shapes[len(sharding.spec)]) for sharding in program.batch_shardings.values()]
    return 4 * sum(map(math.prod, pieces))


def compile_step(program: "Program", hardware: "Hardware", arguments: int) -> "Compiled":
    """Compiles a program's train step; one that does not fit is a result as well.

    Args:
      program: its mesh is of the hardware's devices.
      hardware: what for.
      arguments: bytes on one device, by their shapes.
    """
    import jax

    from lcx.planning.plan import Compiled
    from lcx.planning.targets import COMPILER_OPTIONS
    from lcx.training.trainer import lower_step

    start = time.perf_counter()
    lowered = lower_step(program)
    try:
        done = lowered.compile(compiler_options=dict(COMPILER_OPTIONS[hardware.platform]))
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error), arguments)
        if needed is None:
            raise
        return Compiled(None, arguments, arguments, None, 0, needed, time.perf_counter() - start)
    sizes = done.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    compiled, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    needed, seconds = compiled + temporaries + outputs, time.perf_counter() - start
    return Compiled(done.as_text(), arguments, compiled, temporaries, outputs, needed, seconds)


def bytes_needed(refusal: str, arguments: int) -> int | None:
    """Bytes that a program needs of a device, as the compiler that refuses it says; None where it says another thing.

    arguments: bytes of those, which it may leave out.
    """
    found = _TOO_LARGE.search(refusal)
    if found is None:
        return None
    if found["all"]:
        return int(float(found["used"]) * _UNITS[found["u"]])
    return arguments + int(float(found["working"]) * _UNITS[found["w"]])


def for_hardware(config: Config, hardware: "Hardware") -> tuple[Config, list[str]]:
    """The config with kernels that can be compiled where there is no device, and what that changed."""
    from lcx.mixers import find_mixer

    mixers, changed = {}, []
    for name, record in config.model.mixers.items():
        mixers[name] = dict(record)
        known = find_mixer(record["type"], f"model.mixers.{name}.type").Options.__dataclass_fields__
        attends = {"backend", "num_kv_heads"} <= set(known)
        if hardware.platform == "gpu" and attends and record.get("backend", "auto") in ("auto", "cudnn"):
            mixers[name]["backend"] = "triton"
            changed.append(name)
    notes = [f"{', '.join(changed)}: compiled with backend=triton, since cuDNN needs the GPU itself"] if changed else []
    return replace(config, model=replace(config.model, mixers=mixers)), notes


def with_train(config: Config, **fields: int) -> Config:
    """The config with another batch size or sequence length."""
    return replace(config, train=replace(config.train, **fields))


def unit_of(plan: "Plan") -> Mapping[str, int]:
    """What batch size and sequence length are multiples of on the plan's mesh."""
    from lcx.parallel.sharding import rules_of

    tables, train = rules_of(plan.config.mesh).activations, plan.config.train
    rows, time = (math.prod(plan.mesh[axis] for axis in tables[name]) for name in ("batch", "time"))
    tile = 128 if train.sequence_length % 128 == 0 else 1  # lengths that kernels need not pad
    return {"batch_size": rows * train.accumulate, "sequence_length": math.lcm(time, tile)}


def plan_candidates(config: Config, hardware: "Hardware", say: Callable[[str], None]) -> "list[Plan]":
    """The most promising meshes and remat policies, compiled, the best first. Raises UserError where none divides."""
    from lcx.planning.search import candidates, order

    plans, refusal = [], None
    for candidate in candidates(config, hardware):
        try:
            plans.append(plan_config(candidate, hardware, say))
        except UserError as error:  # what does not divide is known where the program is made
            refusal = error
        if len(plans) == MOST_COMPILED:
            break
    if not plans:
        raise refusal or UserError(f"--search: no mesh of {hardware.devices} devices divides batch and sequence.")
    return sorted(plans, key=order)


def progress() -> AbstractContextManager[Callable[[str], None]]:
    """Says what is being compiled: a spinner on a terminal, lines elsewhere."""
    from contextlib import contextmanager

    from rich.console import Console

    console = Console()

    @contextmanager
    def spinner():
        with console.status("") as status:
            yield lambda text: status.update(text)

    return spinner() if console.is_terminal else nullcontext(lambda text: print(text, flush=True))
