"""Our C++ with vectors of other widths than those of this processor, and watched by the compiler's sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ROOT
from tests.per_sample import test_depthwise, test_mixed

TESTS = {
    test_depthwise: (
        "test_equals_torchs",
        "test_in_channels_last_equals_torchs",
        "TestOneImageWithoutABackwardPass::test_equals_torchs",
    ),
    test_mixed: (
        "test_equals_the_loop",
        "test_one_sample",
        "test_any_batch_and_number_of_kernels",
        "test_blocks_of_whole_pixels",
        "test_products_of_planes",
        "test_few_channels_of_large_planes",
        "test_more_weights_than_are_mixed_at_once",
        "test_any_number_of_threads",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors(capability: str, tmp_path: Path) -> None:
    """Run the tests of shapes in a process that compiles for another processor."""
    done = run_tests(tmp_path, ATEN_CPU_CAPABILITY=capability)
    depthwise = 5 * 3 * len(test_depthwise.SHAPES)
    mixed = 2 * (len(test_mixed.SHAPES) * len(test_mixed.CHANNELS) + len(test_mixed.OF_ONE))
    mixed += 6 * 3 + 2 * 2 * 5 + 2 * 3 * 5 * 4 + 2 * 6 + 1 + 4 * 3 * 2
    assert f"{depthwise + mixed} passed" in done.stdout, done.stdout
    assert len([*(tmp_path / "dyn_lightning").iterdir()]) == 1


@pytest.mark.slow
def test_reads_and_writes_its_own_memory_alone(tmp_path: Path) -> None:
    libraries = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    done = run_tests(
        tmp_path,
        CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        LD_PRELOAD=" ".join(map(str.strip, libraries)),
        ASAN_OPTIONS="detect_leaks=0",  # Python's
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*(tmp_path / "dyn_lightning").iterdir()]) == 1


def run_tests(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of shapes in a process that compiles into a folder of its own, up to the first that fails: where
    the compiler does, each would wait for it.
    """
    tests = [f"{module.__file__}::{name}" for module, names in TESTS.items() for name in names]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", *tests],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
