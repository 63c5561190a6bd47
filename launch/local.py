"""Runs a command as several processes of this machine, each with CPU devices of its own, as if they were hosts.

    python launch/local.py -n 2 scripts/train.py --config=configs/samba.py:size=tiny --workdir=runs/two

The processes find each other as the hosts of a cluster do, and exchange what they compute over the loopback network:
the way to try a run of several hosts before there is one. What the first process says is shown as it is, what the
others say with their number in front. The exit code is 0, or that of the first process to fail.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

GRACE = 10.0  # seconds that the others have when one has failed


def main() -> int:
    """Starts the processes, passes signals on to them and waits."""
    arguments = parse()
    running = start(arguments.command, arguments.processes, arguments.devices)
    return attend(running, lambda received: [process.send_signal(received) for process in running])


def attend(running: list[subprocess.Popen], pass_on: Callable[[int], object]) -> int:
    """Shows what the processes say, gives signals to `pass_on`, and waits; see `wait` for the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: pass_on(received))
    echoes = [threading.Thread(target=echo, args=pair) for pair in enumerate(running)]
    for thread in echoes:
        thread.start()
    failed = wait(running)
    for thread in echoes:
        thread.join()
    return failed


def parse() -> argparse.Namespace:
    """The command line; the command's own flags are left to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, default=2, help="how many processes (default 2)")
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of each process (default 2)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a Python script and its flags")
    arguments = parser.parse_args()
    arguments.command = [word for word in arguments.command[:1] if word != "--"] + arguments.command[1:]
    if not arguments.command:
        parser.error("which command? For one: scripts/train.py --config=... --workdir=...")
    if arguments.processes < 1 or arguments.devices < 1:
        parser.error("-n and --devices must be at least 1")
    if not os.path.exists(arguments.command[0]):
        parser.error(f"there is no script {arguments.command[0]}")
    return arguments


def start(command: list[str], count: int, devices: int) -> list[subprocess.Popen]:
    """The processes, which are told of each other by their environment."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": flags.strip(),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"JAX_PROCESS_ID": str(index)},
            stdout=None if index == 0 else subprocess.PIPE,
            stderr=None if index == 0 else subprocess.STDOUT,
        )
        for index in range(count)
    ]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def echo(index: int, process: subprocess.Popen) -> None:
    """Prints what a process says, with its number in front."""
    for line in process.stdout or ():
        sys.stdout.buffer.write(b"[%d] %s" % (index, line))
        sys.stdout.buffer.flush()


def wait(running: list[subprocess.Popen]) -> int:
    """Returns when all have ended: 0, or the exit code of the first that failed.

    What waits for a process that is gone is ended after a while.
    """
    failed, deadline = 0, None
    while True:
        waiting = [process for process in running if process.poll() is None]
        failed = failed or next((process.returncode for process in running if process.returncode), 0)
        if not waiting:
            return failed
        deadline = deadline or (time.monotonic() + GRACE if failed else None)
        if deadline and time.monotonic() > deadline:
            for process in waiting:
                process.kill()
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
