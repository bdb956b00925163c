"""How the process handles memory that it has freed."""

import ctypes
import os
import platform

# Parameters of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 1 << 30
MOST_OF_OLD_VERSIONS = 32 << 20  # what glibc before 2.35 takes for M_MMAP_THRESHOLD
# With these a user has chosen.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_kept = False


def keep_freed_memory() -> None:
    """Let the C library keep the memory of a batch for the next one, up to 1 GiB at the end of the heap.

    By default glibc hands feature maps back to the system, which gives them anew, page by page and filled with zeros,
    for the next batch: on a CPU up to a third of the time (see experiments/LOG.md). Does nothing where there is another
    C library, or where one of glibc's own environment variables says how it should be. ``dynamic_conv2d`` takes other
    methods afterwards. The commands call it; call it at the start of a program of your own.
    """
    global _kept
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in VARIABLES):
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Both, because to set one ends glibc's own adaptation of the other.
    _kept = bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES))
    if not _kept:
        mallopt(M_MMAP_THRESHOLD, MOST_OF_OLD_VERSIONS)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def is_freed_memory_kept() -> bool:
    """Tell whether ``keep_freed_memory`` had its full effect in this process."""
    return _kept
