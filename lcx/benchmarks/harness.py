"""Timing that survives a noisy machine: contestants take turns, and what is reported are medians and ratios of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """One contestant's seconds a call, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


@dataclass(frozen=True)
class Result:
    """One line of a report."""

    name: str
    value: float
    unit: str
    wanted: str = ""  # what was promised, in words
    holds: bool | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def take_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Calls each contestant once a round, and once before the first for its compilation.

    Args:
      contestants: by name, functions that return JAX arrays (waited for) or anything else.
      rounds: at least 1.
    """
    for call in contestants.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(numerator: Timing, denominator: Timing) -> float:
    """The median of the ratios of the rounds: what slows both in a round cancels."""
    return statistics.median(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))


def seconds_of(timings: Mapping[str, Timing], tokens: int = 0) -> dict[str, float]:
    """The details of a result: seconds of the contestants, how much they varied, their tokens/s of `tokens` a call."""
    found = {f"{name}_seconds": timing.median for name, timing in timings.items()}
    found |= {f"{name}_spread": timing.spread for name, timing in timings.items()}
    return found | ({f"{name}_tokens_per_second": tokens / t.median for name, t in timings.items()} if tokens else {})


def temporaries(function: Callable, *arguments: Any) -> int:
    """Bytes of temporaries of the compiled function; arguments may be ShapeDtypeStructs."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def line(result: Result) -> str:
    """A result in a line, for people who wait."""
    holds = {None: "", True: "", False: "  NOT HELD"}[result.holds]
    wanted = f" (wanted: {result.wanted})" if result.wanted else ""
    return f"{result.name}: {result.value:,.3g} {result.unit}{wanted}{holds}"


def markdown(title: str, results: Sequence[Result]) -> str:
    """A table of results."""
    lines = [f"## {title}", "", "| what | measured | wanted | holds |", "| --- | ---: | --- | --- |"]
    for result in results:
        holds = {None: "", True: "yes", False: "**no**"}[result.holds]
        lines.append(f"| {result.name} | {result.value:,.3g} {result.unit} | {result.wanted} | {holds} |")
    return "\n".join(lines) + "\n"
