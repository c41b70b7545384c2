"""Several ways to do one thing, timed in turn within one run, so that a noisy machine is noisy for all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, between: Callable[[], object] = int
) -> dict[str, list[float]]:
    """Return each side's seconds, one a round; every round runs every side once, in an order that rotates.

    A first round is run and dropped: it warms caches and compilers. `between` is called before each turn, untimed.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            between()
            began = time.perf_counter()
            sides[name]()
            spent = time.perf_counter() - began
            if turn:
                seconds[name].append(spent)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], side: str, other: str) -> float:
    """Return how many times faster `side` was than `other`: the median of the rounds' own ratios."""
    return statistics.median(b / a for a, b in zip(seconds[side], seconds[other], strict=True))


def spread(values: list[float]) -> str:
    """Return "median (least to most)"."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def machine() -> str:
    """Return what the figures were taken on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {platform.machine()}, Python {platform.python_version()}"
