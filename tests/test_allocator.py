"""Memory that is freed stays with the process."""

import importlib
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dyn_lightning import allocator
from dyn_lightning.allocator import VARIABLES

# What a batch does, 25 times: maps of 8 MiB are made, and freed. Prints how many pages the system gave for the last 20.
BATCHES = """
import resource
import torch
from dyn_lightning.allocator import is_freed_memory_kept, keep_freed_memory
assert not is_freed_memory_kept()
keep_freed_memory()
for batch in range(25):
    maps = [torch.ones(2 << 20) for _ in range(10)]
    del maps
    if batch == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, is_freed_memory_kept())
"""
PAGES = 10 * (8 << 20) // os.sysconf("SC_PAGE_SIZE")  # of one batch


def pages_given(**variables: str) -> tuple[int, bool]:
    """Run it in a process of its own, because a process cannot take the setting back."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command = [sys.executable, "-c", BATCHES]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    pages, kept = said.split()
    return int(pages), kept == "True"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
class TestKeepFreedMemory:
    def test_the_next_batch_uses_the_same_pages(self):
        pages, kept = pages_given()
        assert kept
        assert pages < PAGES

    def test_the_user_decides(self):
        pages, kept = pages_given(MALLOC_MMAP_THRESHOLD_="131072")
        assert not kept
        assert pages > 15 * PAGES


def test_an_old_version_that_takes_less_does_not_keep_it(monkeypatch):
    """The maps that are larger than what it takes go back to the system."""
    calls = []

    def mallopt(parameter, value):
        calls.append((parameter, value))
        return int(value <= 32 << 20 or parameter != -3)

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    allocator.keep_freed_memory()
    assert calls == [(-3, 1 << 30), (-3, 32 << 20), (-1, 1 << 30)]
    assert not allocator.is_freed_memory_kept()


@pytest.mark.parametrize("command", ["fit", "evaluate", "analyze"])
def test_every_command_that_runs_a_network_does_it(command, monkeypatch):
    module, calls = importlib.import_module(f"dyn_lightning.{command}"), []
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append(command))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert calls == [command]
