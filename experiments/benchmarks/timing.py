"""What the benchmarks share: interleaved timing, and the versions that a result depends on."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dyn_lightning.record import device_name


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Call the functions in turn, and give the median milliseconds of each after a round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def versions() -> dict[str, str]:
    """Name the software and the device."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(torch.device("cpu")),
    }
