"""What has to be known of the processor: oneMKL, which computes torch's products, is made for Intel's."""

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
    if sys.platform != "linux":  # macOS says "i386", Windows the vendor's name
        return "GenuineIntel" if any(name in platform.processor() for name in ("Intel", "i386")) else ""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
