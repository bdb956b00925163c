"""Our C++ with vectors of other widths than those of this processor."""

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
    test_mixed: ("test_equals_the_loop",),
}


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_processors(capability: str, tmp_path: Path) -> None:
    """Run the tests of shapes in a process that compiles for another processor."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "XDG_CACHE_HOME": str(tmp_path)}
    tests = [f"{module.__file__}::{name}" for module, names in TESTS.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    depthwise = 5 * 3 * len(test_depthwise.SHAPES)
    mixed = 2 * len(test_mixed.SHAPES) * len(test_mixed.CHANNELS)
    assert f"{depthwise + mixed} passed" in done.stdout, done.stdout
    assert len([*(tmp_path / "dyn_lightning").iterdir()]) == 1
