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
    return _cpuinfo().get("vendor_id", "")


def processor_name() -> str:
    """Say what the system says of the processor: its name, vendor, family and model on Linux on x86."""
    found = _cpuinfo() if sys.platform == "linux" else {}
    if "vendor_id" not in found:
        return platform.processor() or platform.machine()
    return "{model name} ({vendor_id}, family {cpu family}, model {model})".format_map(found)


def _cpuinfo() -> dict[str, str]:
    """Read what Linux says of the first processor."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}
