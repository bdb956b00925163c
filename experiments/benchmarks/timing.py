"""What the benchmarks share: interleaved timing, and the versions that a result depends on."""

import ctypes
import datetime
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch

from dyn_lightning.record import device_name, packages

CPU = torch.device("cpu")


def in_turn(
    measure: Callable[[str], list[float]],
    names: Sequence[str],
    rounds: int,
    patience: float = math.inf,
    sure: int = 2,
    baseline: str = "static",
) -> dict[str, float]:
    """Measure several things in turn, in an order drawn for each round, and give each one's median milliseconds.

    In a fixed order each would always find the cache as the same other one left it; there and back, the first and the
    last would find it as they left it themselves.

    Args:
        measure: gives one or more measurements of a name.
        names: of what is measured.
        rounds: how many times each is measured.
        patience: what takes this many times as long as the fastest, each at its best, is not measured again.
        sure: rounds that each is measured in any case.
        baseline: does not count as the fastest.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        fastest = min((min(taken) for name, taken in times.items() if taken and name != baseline), default=math.inf)
        for name in Random(turn).sample(names, len(names)):
            if turn < sure or min(times[name]) <= patience * fastest:
                times[name] += measure(name)
    return {name: round(statistics.median(taken), 4) for name, taken in times.items()}


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device = CPU,
    patience: float = math.inf,
    least_ms: float = 0,
) -> dict[str, float]:
    """Call functions in turn, and give each one's median milliseconds.

    Args:
        functions: by name; each is called once before, to warm up.
        rounds: as in ``in_turn``, like ``patience``.
        device: which is waited for.
        patience: how slow is too slow to be measured again.
        least_ms: a function that takes less is called several times in a row, and the mean counts as one measurement.
    """
    calls = dict.fromkeys(functions, 1)
    for name, function in functions.items():
        function()
        if least_ms:
            calls[name] = max(1, min(100, math.ceil(least_ms / max(milliseconds(function, 1, device), 1e-3))))
    return in_turn(lambda name: [milliseconds(functions[name], calls[name], device)], [*functions], rounds, patience)


def milliseconds(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Give the mean time of some calls in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def give_back_memory(device: torch.device = CPU) -> None:
    """Hand what the allocators keep for later back to the system, where they can (CUDA, and glibc for the CPU)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def versions(device: torch.device = CPU) -> dict[str, str]:
    """Name the software, the device and the day."""
    return {
        **packages(),
        "python": platform.python_version(),
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
    }
