"""What the benchmarks share: interleaved timing, peak memory, and the versions that a result depends on."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from dyn_lightning.record import device_name

CPU = torch.device("cpu")


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU, patience: float = float("inf")
) -> dict[str, float]:
    """Call the functions in turn, and give the median milliseconds of each after a round to warm up.

    What took ``patience`` times as long as the fastest in that round is not called again: its one time is given.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        fastest = min((taken[0] for taken in times.values() if turn), default=float("inf"))
        for name, function in functions.items():
            if turn and times[name][0] > patience * fastest:
                continue
            _finish(device)
            start = time.perf_counter()
            function()
            _finish(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken[1:] or taken) for name, taken in times.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device = CPU) -> int:
    """Give the bytes that tensors made by a function take at once while it runs.

    On a CPU, what an operation allocates inside (oneDNN's layouts, a chunk's kernels) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    tracker = MemTracker()
    with tracker:
        function()
    return max((sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values()), default=0)


def versions(device: torch.device = CPU) -> dict[str, str]:
    """Name the software, the device and the day."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
    }
