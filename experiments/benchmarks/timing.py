"""What the benchmarks share: interleaved timing, and the versions that a result depends on."""

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dyn_lightning.record import device_name, packages

CPU = torch.device("cpu")


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device = CPU,
    patience: float = float("inf"),
    least_ms: float = 0,
    settle: bool = False,
) -> dict[str, float]:
    """Call the functions in turn, in the other direction every second round, and give each one's median milliseconds.

    Args:
        functions: by name; each is called once before, to warm up.
        rounds: how many times each is measured.
        device: which is waited for.
        patience: what took this many times as long as the fastest in the first round is not measured again.
        least_ms: a function that takes less is called several times in a row, and the mean counts as one measurement.
        settle: call a function before each of its measurements too. A training step follows one of its own kind, which
            left memory as it needs it; after another network's it may take half as long again.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    for name, function in functions.items():
        function()
        if least_ms:
            calls[name] = max(1, min(100, math.ceil(least_ms / max(_milliseconds(function, 1, device), 1e-3))))
    for turn in range(rounds):
        fastest = min((taken[0] for taken in times.values() if turn), default=float("inf"))
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            if not turn or times[name][0] <= patience * fastest:
                if settle:
                    functions[name]()
                times[name].append(_milliseconds(functions[name], calls[name], device))
    return {name: round(statistics.median(taken), 4) for name, taken in times.items()}


def _milliseconds(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def versions(device: torch.device = CPU) -> dict[str, str]:
    """Name the software, the device and the day."""
    return {
        **packages(),
        "python": platform.python_version(),
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
    }
