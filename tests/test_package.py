"""The wheel, installed elsewhere."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.command_line import ROOT, SMALL, write_config


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_holds_all_modules_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folder = ROOT / "dyn_lightning"
    package = {str(path.relative_to(ROOT)) for end in ("py", "cpp", "h") for path in folder.rglob(f"*.{end}")}
    callbacks = {f"dyn_lightning/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    assert inside == package | callbacks


def test_trains_in_a_folder_that_has_callbacks_of_its_own(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # Its dependencies are this environment's, but not this environment's editable dyn_lightning.
    (path,) = environment.glob("lib/python*/site-packages")
    (path / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True
    )
    work = tmp_path / "work"
    (work / "callbacks").mkdir(parents=True)
    (work / "callbacks" / "__init__.py").write_text("raise RuntimeError('the wrong callbacks')")
    write_config(work, config={**SMALL, "model": {**SMALL["model"], "backbone": "cifar_resnet"}})
    done = subprocess.run(
        [python, "-m", "dyn_lightning.fit", "--config", "small.yaml", "--trainer.fast_dev_run", "true"],
        cwd=work,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test/top1" in done.stdout
