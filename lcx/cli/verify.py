"""`lcx verify`: tries a config on a mesh, before money is spent on it."""

import importlib.metadata
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from etils import epath

from lcx.cli.flags import CONFIG, Flag, parse, read_config
from lcx.config import MESH_AXES, Config, MeshConfig
from lcx.errors import UserError, suggest
from lcx.files import write_json

if TYPE_CHECKING:
    import jax

    from lcx.cli.certify import Finding

SUMMARY = """\
Tries the five laws on a config, made small (the same pattern, options and mixers), and on a mesh of CPU devices, which
it makes. Outputs, loss and each parameter's gradient are compared with those of one device. Writes certificate.json.
Exit code 0: all laws hold; 1: one does not."""
FLAGS = [
    CONFIG,
    Flag("mesh", "devices along the axes, those left out being 1: data=2,seq=4", required=True),
    Flag("workdir", "the folder for certificate.json, that of a run or any other", required=True),
]
MOST_DEVICES = 64  # that a machine without accelerators can play


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    values = parse("verify", SUMMARY, FLAGS, argv)
    config = Config.from_dict(read_config(values))
    config = replace(config, mesh=parse_mesh(values.mesh, config.mesh))
    folder = epath.Path(values.workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before minutes are spent
        mesh = make_cpu_mesh(config.mesh)
        from lcx.cli.certify import certify  # takes seconds: flax, optax

        with Report() as report:
            certificate = certify(config, mesh, report.add)
        write_json(folder / "certificate.json", certificate)
    except OSError as error:
        raise UserError(f"the workdir {values.workdir} cannot be written: {error.strerror}.") from None
    print(verdict(certificate, values.mesh))
    print(f"certificate: {folder / 'certificate.json'}")
    return 0 if certificate["passed"] else 1


def parse_mesh(text: str, rules: MeshConfig | None = None) -> MeshConfig:
    """The mesh that "data=2,seq=4" describes, with the rules of another one.

    Raises UserError for what cannot be read, and an unknown axis.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    given = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*0*([1-9]\d*)\s*", part)
        if not match:
            raise UserError(f'--mesh: cannot read "{part}" in "{text}": write axes and sizes, like data=2,seq=4.')
        axis, size = match.groups()
        if axis not in sizes:
            raise UserError(f'--mesh: unknown axis "{axis}": {suggest(axis, sizes)}')
        if axis in given:
            raise UserError(f"--mesh: {axis} is given twice.")
        given.add(axis)
        sizes[axis] = int(size)
    return replace(rules or MeshConfig(), **sizes)


def make_cpu_mesh(config: MeshConfig) -> "jax.sharding.Mesh":
    """A mesh of as many CPU devices, whatever accelerator is there; in a process that has CPU devices, of the first.

    Raises UserError for more devices than are there or can be.
    """
    count = math.prod(getattr(config, axis) for axis in MESH_AXES)
    if count > MOST_DEVICES:
        raise UserError(
            f"--mesh: {count} devices are more than the {MOST_DEVICES} that verify makes of a CPU; certify a smaller "
            "mesh with the same axes: 2 to 8 along each."
        )
    devices = cpu_devices(count)
    from lcx.parallel.mesh import make_mesh

    return make_mesh(config, devices)


def cpu_devices(count: int) -> list:
    """The first CPU devices; where JAX has not started, it is started with that many and nothing else."""
    flags = os.environ.get("XLA_FLAGS", "")
    quick = ["--xla_backend_optimization_level=0"]  # small arrays: compiling is what takes the time
    if importlib.metadata.version("jax") < "0.11":  # later ones have one generator, and end at a flag they do not know
        quick.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([flags, *quick])  # read when JAX starts, if it has not
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # it has
    finally:
        devices = jax.devices("cpu")
        os.environ["XLA_FLAGS"] = flags
    if len(devices) < count:
        raise UserError(
            f"--mesh: it takes {count} CPU devices, and JAX has been started with {len(devices)}: run `lcx verify` as "
            "a process of its own."
        )
    return devices[:count]


def verdict(certificate: Mapping, mesh: str) -> str:
    """One line, or one for each law that does not hold."""
    failed = [finding for finding in certificate["laws"] if not finding["passed"]]
    if not failed:
        return f"certified on {mesh}: all laws hold."
    return "\n".join(f"FAILED on {mesh}: {finding['law']}: {_what(finding)}" for finding in failed)


def _what(finding: Mapping) -> str:
    if finding["error"]:
        return finding["error"]
    return f"{finding['first']} is the first that differs; most does {finding['where']}"


class Report:
    """The table of findings: with rich on a terminal; elsewhere a line each, as they come."""

    COLUMNS = (("law", 13), ("what is compared", 47), ("allowed", 8), ("found", 9), ("", 8), ("where", 0))

    def __init__(self):
        from rich.console import Console

        self.console = Console()
        self.rows: list[tuple[str, ...]] = []

    def __enter__(self) -> "Report":
        if self.console.is_terminal:
            self.status = self.console.status("making the config small, and its documents")
            self.status.start()
        else:
            self._print_plain([name for name, _ in self.COLUMNS])
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.status.stop()
            self._print_table()

    def add(self, finding: "Finding | str") -> None:
        """One more finding, or what is being tried next."""
        if isinstance(finding, str):
            if self.console.is_terminal:
                self.status.update(finding)
            return
        self.rows.append(finding.row())
        if not self.console.is_terminal:
            self._print_plain(self.rows[-1])

    def _print_plain(self, cells: Iterable[str]) -> None:
        line = "  ".join(f"{cell:<{width}}" for cell, (_, width) in zip(cells, self.COLUMNS, strict=True))
        print(line.rstrip(), flush=True)

    def _print_table(self) -> None:
        from rich.table import Table

        table = Table()
        for name, _ in self.COLUMNS:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            style = None if row[4] == "holds" else "bold red" if row[4] == "BROKEN" else "yellow"
            table.add_row(*row, style=style)
        self.console.print(table)
