import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.command_line import SMALL, fit, in_this_process, write_config

# Triton asks for it when it is first imported: where there is no GPU, its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without this, a failed assert of the contract would not show its values.
pytest.register_assert_rewrite("tests.contract")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_a_process_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a test calls in this process keep freed memory, on which the choice of a method depends, as on the
    processor: wherever the tests run, it is none of Intel's.
    """
    monkeypatch.setattr("dyn_lightning.allocator._kept", False)
    monkeypatch.setattr("dyn_lightning.per_sample.processor._vendor", lambda: "")


@pytest.fixture(scope="session")
def observed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ``both.yaml`` with all observers; its network has routed and grouped layers."""
    folder = tmp_path_factory.mktemp("observed")
    config = {**SMALL, "model": {**SMALL["model"], "backbone": "tests.nets.Both", "group_budget": 4}}
    done = fit(folder, "--config", str(write_config(folder, "both.yaml", config)), "--trainer.max_epochs", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "both" / "version_0"


@pytest.fixture
def copied_run(observed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, in the folder in which commands are called in this process."""
    in_this_process(tmp_path, monkeypatch)
    copy = tmp_path / "runs" / "both" / "version_0"
    shutil.copytree(observed_run, copy)
    return copy
