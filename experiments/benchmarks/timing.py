"""What the benchmarks share: interleaved timing, and the versions that a result depends on."""

import ctypes
import datetime
import math
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dyn_lightning.record import device_name, packages

CPU = torch.device("cpu")
Name = TypeVar("Name")


def in_turn(
    measure: Callable[[str], list[float]],
    names: Sequence[str],
    rounds: int,
    patience: float = math.inf,
    baseline: str = "static",
) -> dict[str, list[float]]:
    """Measure several things in turn, in an order drawn for each round, and give all of each one's measurements.

    In a fixed order each would always find the cache as the same other one left it; there and back, the first and the
    last would find it as they left it themselves. Drawn from a seed, the orders would be the same in every pass.

    Args:
        measure: gives one or more measurements of a name.
        names: of what is measured.
        rounds: how many times each is measured.
        patience: what takes this many times as long as the fastest, each at its best, is measured in two rounds alone.
        baseline: does not count as the fastest.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        fastest = min((min(taken) for name, taken in times.items() if taken and name != baseline), default=math.inf)
        for name in random.SystemRandom().sample(names, len(names)):
            if turn < 2 or min(times[name]) <= patience * fastest:
                times[name] += measure(name)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Give each one's median milliseconds."""
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
    return medians(
        in_turn(lambda name: [milliseconds(functions[name], calls[name], device)], [*functions], rounds, patience)
    )


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


def in_slices(
    processes: Mapping[Name, subprocess.Popen[bytes]], begins: Mapping[Name, Path], slice: float = 0.5
) -> dict[Name, tuple[float, float]]:
    """Let one process at a time run, in turn, to their ends: what slows the machine down for seconds slows all of them.

    Args:
        processes: that were started, by name.
        begins: a file by name that is there when what counts begins.
        slice: seconds of a turn.

    Returns:
        The seconds in which each process could run, all of them and from when its file was there.
    """
    seconds = {name: [0.0, 0.0] for name in processes}
    for process in processes.values():
        process.send_signal(signal.SIGSTOP)
    try:
        while running := [name for name, process in processes.items() if process.poll() is None]:
            for name in running:
                counts = begins[name].exists()
                took = _turn(processes[name], slice)
                seconds[name][0] += took
                seconds[name][1] += took * counts
    finally:
        for process in processes.values():
            process.kill()  # does nothing to what has ended
    if any(process.returncode for process in processes.values()):
        raise RuntimeError(f"exit codes {[process.returncode for process in processes.values()]} must be 0")
    return {name: (whole, counted) for name, (whole, counted) in seconds.items()}


def _turn(process: subprocess.Popen[bytes], seconds: float) -> float:
    start = time.perf_counter()
    process.send_signal(signal.SIGCONT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGSTOP)
    return time.perf_counter() - start


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
