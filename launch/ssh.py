"""Runs a command on several hosts through ssh, one process a host, as one run.

    python launch/ssh.py --hosts=node1,node2 scripts/train.py --config=configs/samba.py:size=421m --workdir=/shared/run

The hosts need no password, the same folder with the repository at the same place (this one, or --folder), the same data
and, for the workdir, a file system that all see. The first one is the coordinator. What the first process says is shown
as it is, what the others say with their number in front. A signal is passed on to all: they save, and the exit code is
75. It is 0 when all have finished, or that of the first process to fail.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import uuid

from local import attend  # of this folder: how several processes speak and end

SSH = ["ssh", "-o", "BatchMode=yes"]  # a host that would ask for a password is an error


def main() -> int:
    """Starts a process on each host, passes signals on and waits."""
    arguments = parse()
    run = uuid.uuid4().hex[:12]
    running = [
        subprocess.Popen(
            [*SSH, host, remote_command(arguments, run, index)],
            stdin=subprocess.DEVNULL,
            stdout=None if index == 0 else subprocess.PIPE,
            stderr=None if index == 0 else subprocess.STDOUT,
        )
        for index, host in enumerate(arguments.hosts)
    ]

    def pass_on(received: int) -> None:
        for index, host in enumerate(arguments.hosts):  # ssh passes no signals on by itself
            name = signal.Signals(received).name.removeprefix("SIG")
            subprocess.Popen([*SSH, host, f"kill -s {name} $(cat {pid_file(run, index)})"])

    return attend(running, pass_on)


def parse() -> argparse.Namespace:
    """The command line; the command's own flags are left to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", required=True, help="names for ssh, with commas; the first is the coordinator")
    parser.add_argument("--folder", default=os.getcwd(), help="where the repository is on the hosts (default: here)")
    parser.add_argument("--python", default="python", help="the Python of the hosts (default: python)")
    parser.add_argument("--device", choices=("gpu", "tpu", "cpu"), default="gpu", help="whose XLA flags to set")
    parser.add_argument("--coordinator", help="the first host's address for the others (default: its name)")
    parser.add_argument("--port", type=int, default=8476, help="of the coordinator (default 8476)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a Python script and its flags")
    arguments = parser.parse_args()
    arguments.hosts = [host for host in arguments.hosts.split(",") if host]
    if not arguments.hosts or len(set(arguments.hosts)) < len(arguments.hosts):
        parser.error("--hosts: name at least one host, and each once: --hosts=node1,node2")
    if not arguments.command:
        parser.error("which command? For one: scripts/train.py --config=... --workdir=...")
    return arguments


def remote_command(arguments: argparse.Namespace, run: str, index: int) -> str:
    """What a host's shell is given: it tells the process of the others and becomes it."""
    first = arguments.coordinator or arguments.hosts[0].rpartition("@")[2]
    environment = {}
    if len(arguments.hosts) > 1:
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"{first}:{arguments.port}",
            "JAX_NUM_PROCESSES": str(len(arguments.hosts)),
            "JAX_PROCESS_ID": str(index),
        }
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    words = shlex.join([arguments.python, *arguments.command])
    flags = f"source launch/xla_flags.sh {arguments.device}"
    script = f"echo $$ > {pid_file(run, index)} && {flags} && exec env {exports} {words}"
    return f"cd {shlex.quote(arguments.folder)} && exec bash -c {shlex.quote(script)}"


def pid_file(run: str, index: int) -> str:
    """Where a host's process leaves its number, for signals."""
    return f"/tmp/lcx-{run}-{index}.pid"


if __name__ == "__main__":
    sys.exit(main())
