"""Runs the package's commands as a user does: another process, in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]

SMALL: dict[str, Any] = {
    "model": {"backbone": "tests.nets.Plain", "conv": "dynamic", "conv_args": {"num_kernels": 3}, "lr": 0.05},
    "data": {"class_path": "Digits", "init_args": {"image_size": 16, "batch_size": 64}},
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "TemperatureAnnealing", "init_args": {"epochs": 2}}],
    },
}


def fit(folder: Path, *arguments: str, timeout: float = 180, **environment: str) -> subprocess.CompletedProcess:
    """Run ``python -m dyn_lightning.fit`` in a folder, with the tests importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "dyn_lightning.fit", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ready to call ``main`` in a folder, with the arguments alone; what it sets is taken back."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fit"])
    for name in ("DYN_LIGHTNING_TRACEBACK", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *arguments: str) -> str:
    """Give the message of a command that ends with exit code 2 and leaves nothing behind."""
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    assert set(Path().rglob("*")) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def write_config(folder: Path, name: str = "small.yaml", config: dict[str, Any] | str = SMALL) -> Path:
    path = folder / name
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf8")
    return path
