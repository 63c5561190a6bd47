"""Several processes that are one run: how they find each other, and what they decide together."""

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from lcx import errors
from lcx.errors import UserError

# What says, in the environment of a process, how many there are: of launch/local.py, SLURM and Open MPI. Of the last
# two JAX knows by itself how to find the coordinator; so it does on the hosts of a TPU slice.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
TPU_HOSTS = "TPU_WORKER_HOSTNAMES"

_meetings = itertools.count()


def join() -> None:
    """Joins the run's other processes, where the environment names any; to be called before JAX is used.

    Raises UserError where it names them by halves.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `training.preemption`
    named = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    if any(named.values()):
        missing = " and ".join(name for name, value in named.items() if not value)
        if missing:
            given = " and ".join(name for name, value in named.items() if value)
            raise UserError(f"{given} is set, but {missing} not: several processes need all three, one needs none.")
        try:
            count, index = int(named[COUNT]), int(named[INDEX])
        except ValueError:
            raise UserError(f"{COUNT}={named[COUNT]} and {INDEX}={named[INDEX]} must be numbers.") from None
        if not 0 <= index < count:
            raise UserError(f"{INDEX}={index} must be below {COUNT}={count}, and at least 0.")
        jax.distributed.initialize(named[COORDINATOR], count, index, cluster_detection_method="deactivate")
    elif any(int(os.environ.get(name) or 1) > 1 for name in CLUSTERS) or "," in os.environ.get(TPU_HOSTS, ""):
        jax.distributed.initialize()


def leave() -> None:
    """Waits for the other processes and parts from them, for whoever then ends without Python's own farewell."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """What `function()`, called on the first process alone, returns: the same on all of them.

    Args:
      function: returns what JSON can hold.

    Raises on every process the UserError that it raises on the first.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome["value"] = function()
        except UserError as error:
            outcome["error"], outcome["kind"] = str(error), type(error).__name__
    outcome = json.loads(_from_first(json.dumps(outcome).encode()))
    if "error" in outcome:
        raise getattr(errors, outcome["kind"], UserError)(outcome["error"])
    return outcome["value"]


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError, on every process, naming the first of these facts that is not the same on all processes.

    Args:
      facts: by name, what JSON can hold; each process has the same names in the same order.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest() for fact in facts.values()]
    mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    everyones = multihost_utils.process_allgather(mine)  # [processes, facts, 32]
    for fact, name in enumerate(facts):
        different = np.flatnonzero((everyones[:, fact] != everyones[0, fact]).any(axis=-1))
        if different.size:
            raise UserError(
                f"process {different[0]} of {len(everyones)} has another {name} than process 0: "
                "start all of them with the same command, code and data."
            )


def meet(limit: int = 3600) -> None:
    """Returns when all processes are here, within `limit` seconds.

    One of them may find a program in its cache that another one compiles for minutes, and some collectives give up
    when the others are half a minute late: so all meet before they run what they have compiled.
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(f"lcx/{next(_meetings)}", timeout=limit, processes=everyone)


def any_asks(mesh: jax.sharding.Mesh, asks: Callable[[], bool]) -> Callable[[], bool]:
    """A question that all processes put at the same time, again and again: does any of them ask for it?

    One process gets the answer at once. Several learn what was so when they put the question the time before: the
    exchange has the time of a step, and nobody waits for it.
    """
    if jax.process_count() == 1:
        return asks
    everywhere = NamedSharding(mesh, PartitionSpec())
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    either = jax.jit(lambda answers: answers.any(), out_shardings=everywhere)
    outcomes = collections.deque([False])

    def question() -> bool:
        mine = np.array([asks()])
        outcomes.append(either(jax.make_array_from_callback((mesh.size,), each, lambda _: mine)))
        return bool(outcomes.popleft())

    return question


def _from_first(message: bytes) -> bytes:
    """The first process's bytes, on all."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(length, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(message, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))
