"""The folder of a run, and the record that says how its results came to be."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dyn_lightning.cost import peak_memory

PACKAGES = ("dyn-lightning", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "jsonargparse", "timm")


class RunFolder:
    """``ROOT/NAME/version_N``: a new one for every start, or the newest one to go on with.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @classmethod
    def new(cls, root: Path, name: str) -> "RunFolder":
        """Take the next free number, without creating the folder."""
        return cls(root / name / f"version_{max((run.number for run in cls.all(root, name)), default=-1) + 1}")

    def claim(self) -> "RunFolder":
        """Create the folder, or the next one if somebody else was faster."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            return RunFolder(self.path.with_name(f"version_{self.number + 1}")).claim()
        return self

    def give_back(self) -> None:
        """Remove the folder and those above it that are empty."""
        for path in (self.path, self.path.parent, self.path.parent.parent):
            with contextlib.suppress(OSError):
                path.rmdir()

    @classmethod
    def all(cls, root: Path, name: str) -> "list[RunFolder]":
        """List the runs of this name, oldest first."""
        paths = [path for path in (root / name).glob("version_*") if path.name[8:].isdigit()]
        return sorted((cls(path) for path in paths), key=lambda run: run.number)

    @classmethod
    def newest(cls, root: Path, name: str) -> "RunFolder":
        """Find the newest run that has a checkpoint; one that was stopped before its first has nothing to go on with.

        Raises:
            ValueError: there is none.
        """
        for run in reversed(cls.all(root, name)):
            if run.last() is not None:
                return run
        raise ValueError(f"no run below {root / name} has a checkpoint: start without --ckpt_path, or give --name")

    @property
    def number(self) -> int:
        """N of ``version_N``."""
        return int(self.path.name[8:])

    def last(self) -> Path | None:
        """Find the last checkpoint, which Lightning may have numbered (``last-v1.ckpt``)."""
        return max(self.checkpoints.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)

    def best(self) -> Path | None:
        """Find the best checkpoint, as the last one knows it; one of weights alone knows it where there is but one."""
        last = self.last()
        saved = torch.load(last, map_location="cpu", weights_only=True, mmap=True) if last else {}
        if "callbacks" not in saved:
            found = list(self.checkpoints.glob("best*.ckpt"))
            return found[0] if len(found) == 1 else None
        states = saved["callbacks"]
        best = [
            state["best_model_path"] for state in states.values() if isinstance(state, dict) and state.get("monitor")
        ]
        paths = [self.checkpoints / Path(path).name for path in best if path]  # the folder may have been moved
        return next((path for path in paths if path.is_file()), None)

    def checkpoint(self, which: str) -> Path:
        """Find the ``"last"`` or ``"best"`` checkpoint.

        Raises:
            ValueError: there is none.
        """
        path = self.last() if which == "last" else self.best()
        if path is None:
            raise ValueError(f"--ckpt_path {which}: {self.path} has no {which} checkpoint")
        return path

    def unused(self, name: str) -> Path:
        """Give the path of a file that does not exist yet: ``config.yaml``, then ``config-1.yaml``, ..."""
        path, number = self.path / name, 0
        while path.exists():
            number += 1
            path = self.path / f"{Path(name).stem}-{number}{Path(name).suffix}"
        return path


class Record:
    """A context that writes how a run was made, and how it ended, to a JSON file; whole at any moment.

    Args:
        path: the file, or None: nothing is written.
        device: that the run is on.
        devices: how many devices work on the run, for the device-hours.
        facts: what else is known: parameters, multiply-adds, seed, ...
    """

    def __init__(self, path: Path | None, device: torch.device, devices: int, **facts: Any) -> None:
        self.path = path
        self.device = device
        self.devices = devices
        self.facts: dict[str, Any] = {
            "status": "running",
            "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "git": git_state(),
            "packages": packages(),
            "python": platform.python_version(),
            "device": device_name(device),
            "devices": devices,
            **facts,
        }

    def __enter__(self) -> "Record":
        self._start = time.monotonic()
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._start
        self.facts |= {
            "status": "finished" if error is None else f"failed: {kind.__name__ if kind else ''}: {error}",
            "seconds": round(seconds, 3),
            "device_hours": round(seconds * self.devices / 3600, 6),
            "peak_memory_bytes": peak_memory(self.device),
        }
        self.write()

    def write(self) -> None:
        """Write what is known now, to have it whatever happens next."""
        if self.path is not None:
            write_json(self.path, self.facts)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole at any moment; NaN and infinity become null."""
    write_whole(path, (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read what ``write_json`` wrote; empty if there is no such file, or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole at any moment, also if the power fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Turn NaN and infinity, which JSON lacks, into null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_name(device: torch.device) -> str:
    """Name the accelerator, or the processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    processor = f"{kind}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return processor if device.type == "cpu" else f"{device.type} of {processor}"


def packages() -> dict[str, str]:
    """Give the versions of the packages that decide a result, torch's with its build."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"torch": torch.__version__}


def git_state() -> dict[str, str] | None:
    """Give the commit of the folder that the command runs in, and what differs from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, errors="replace").stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "status": git("status", "--porcelain"),
            "diff": git("diff", "HEAD"),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
