"""What has to be known of the processor: Intel's multiply two of the widest vectors at once, and oneMKL, which computes
torch's products, is made for them.
"""

import functools
import platform
import sys
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


@torch.compiler.assume_constant_result
def is_intel() -> bool:
    """Tell whether the processor is one of Intel's."""
    return _vendor() == "GenuineIntel"


@functools.cache
def _vendor() -> str:
    if sys.platform != "linux":
        return "GenuineIntel" if "Intel" in platform.processor() else ""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
