"""Plans for people: tables in plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from lcx.planning.plan import Plan
from lcx.planning.roofline import WHAT

RESOURCES = ("matrix", "vector", "memory", "link")


def table(plan: Plan) -> str:
    """Everything that a plan says."""
    train = plan.config.train
    lines = [
        f"{plan.config.model.family} on {plan.hardware.name}: mesh {_mesh(plan)}, {train.batch_size} rows of "
        f"{train.sequence_length:,} tokens a step",
        "",
        *_memory(plan),
        "",
        *_layers(plan),
        "",
        *_wire(plan),
        "",
        *_estimate(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def ranking(plans: Sequence[Plan]) -> str:
    """The candidates of a search, a line each."""
    rows = [("mesh", "remat", "fits", "GiB", "seconds a step", "MFU")]
    for plan in plans:
        policies = plan.config.model.remat_policies
        alike = set(policies.values())
        remat = alike.pop() if len(alike) == 1 else " ".join(f"{name}={policy}" for name, policy in policies.items())
        seconds, mfu = plan.seconds, plan.mfu
        rows.append(
            (
                _mesh(plan),
                remat,
                "yes" if plan.fits else "no",
                _gib(plan.memory.total),
                "?" if seconds is None else f"{seconds:.3f}",
                "?" if mfu is None else f"{mfu:.1%}",
            )
        )
    return "\n".join([f"compiled of all meshes and policies, best first ({WHAT}):", *_columns(rows), ""])


def largest_line(found: Mapping[str, Any]) -> str:
    """The largest batch and sequence."""
    batch, length = found["batch_size"], found["sequence_length"]
    shown = "unknown" if batch is None else f"batch_size={batch:,}"
    shown += "" if length is None else f", or sequence_length={length:,}"
    return f"largest that fits: {shown} ({found['method']})"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = [("bytes on one device", "GiB")]
    for name in ("parameters", "optimizer", "batch", "activations", "temporaries", "total"):
        value = getattr(memory, name)
        rows.append((name, "?" if value is None else _gib(value)))
    rows.append(("there are", _gib(plan.hardware.memory)))
    return [*_columns(rows), "it fits" if plan.fits else "IT DOES NOT FIT"]


def _layers(plan: Plan) -> list[str]:
    rows = [("kind of layer", "model TFLOPs a step", *(f"{name} ms" for name in RESOURCES), "bound by")]
    flops = plan.to_dict()["model_flops"]["by_layer"]
    for kind in {**flops, **(plan.times or {})}:
        count, times = flops.get(kind, 0), (plan.times or {}).get(kind)
        cells = ["" if times is None else f"{1e3 * getattr(times, name):.2f}" for name in RESOURCES]
        rows.append((kind, "?" if count is None else f"{count / 1e12:,.3f}", *cells, times.bound if times else ""))
    return _columns(rows)


def _wire(plan: Plan) -> list[str]:
    if plan.count is None:
        return ["what is sent is not known: the program was not compiled to its end"]
    rows = [("kind of layer", "collective", "mesh axes", "MB a device sends")]
    for entry in plan.to_dict()["wire"]:
        if entry["bytes"] >= 5_000:
            rows.append((entry["layer"], entry["collective"], " ".join(entry["axes"]), f"{entry['bytes'] / 1e6:,.2f}"))
    return _columns(rows) if len(rows) > 1 else ["nothing is sent between devices"]


def _estimate(plan: Plan) -> list[str]:
    compiled = f"compiled in {plan.compiled.seconds:.0f} s"
    if not plan.seconds:
        return (
            [f"no estimate of time: no rates are known of {plan.hardware.kind}; {compiled}"]
            if (plan.hardware.chip is None)
            else [compiled]
        )
    mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    rate = plan.tokens / plan.seconds
    return [f"estimate: {plan.seconds:.3f} s a step, {rate:,.0f} tokens/s{mfu} ({WHAT}); {compiled}"]


def _mesh(plan: Plan) -> str:
    return " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "of one device"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Text to the left in the first column, numbers to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    pad = lambda cell, width, i: cell.ljust(width) if not i else cell.rjust(width)  # noqa: E731
    return ["  ".join(pad(*cell) for cell in zip(row, widths, range(len(row)), strict=True)).rstrip() for row in rows]
