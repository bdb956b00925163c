"""Trains and inspects one network of a study in processes of its own, from wherever it was left."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyn_lightning.ablation.study import digest
from dyn_lightning.record import RunFolder, read_json, write_json

LINES = 20  # of the log of a cell that failed
MARK = "DYN_LIGHTNING_CELL"  # in the environment of its processes
NOT_INHERITED = ("PL_GLOBAL_SEED", "SLURM_", "SUBMITIT_")
COMMANDS = {name: (sys.executable, "-m", f"dyn_lightning.{name}") for name in ("fit", "evaluate")}


class CellFailedError(RuntimeError):
    """A cell's process has ended with an error; the message has the last lines of its log."""


class Processes:
    """The processes that one launcher has started, so that it can end them.

    Args:
        sessions: whether each begins a session, so that Ctrl-C reaches this process alone, which ends the others.
    """

    def __init__(self, sessions: bool = True) -> None:
        self.sessions = sessions
        self.stopped = False
        self.mark = uuid.uuid4().hex
        self._running: set[subprocess.Popen] = set()

    def call(self, command: Sequence[str], log: Path, lock: int, environment: Mapping[str, str]) -> int:
        """Run a command, and give its exit code, negative if a signal has killed it.

        Args:
            command: what to run.
            log: the file that its output is appended to.
            lock: a file descriptor that it inherits: the lock holds as long as it lives, also if this process dies.
            environment: its variables.
        """
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**environment, MARK: self.mark},
                pass_fds=[lock],
                start_new_session=self.sessions,
            )
        self._running.add(process)
        try:
            if self.stopped:
                process.terminate()
            return process.wait()
        finally:
            self._running.discard(process)
            self._kill(process)  # of several processes that train together, the others

    def stop(self, patience: float = 30.0) -> None:
        """End all that runs: ask first, and kill what has not ended after some seconds."""
        self.stopped = True
        for process in list(self._running):
            process.terminate()  # once: what handles the signal may be disturbed by a second one
        end = time.monotonic() + patience
        while self._running and time.monotonic() < end:
            time.sleep(0.05)
        for process in list(self._running):
            self._kill(process)

    def _kill(self, process: subprocess.Popen) -> None:
        """Kill a process, and what it may have left."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.sessions:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        for left in [] if self.sessions else self._marked():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(left, signal.SIGKILL)

    def _marked(self) -> Iterator[int]:
        """Find the processes that have this launcher's mark in their environment."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)


@dataclass(frozen=True)
class CellFolder:
    """The folder of a cell: its configuration, its run as ``fit`` makes it, its log and its inspection.

    Args:
        path: ``STUDY/cells/NAME``; ``cell.yaml`` lies in it.
        inspection: the arguments of ``evaluate`` by name; empty: nothing is inspected.
        commands: that run ``fit`` and ``evaluate``.
    """

    path: Path
    inspection: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, Sequence[str]] = field(default_factory=lambda: COMMANDS)

    @property
    def record(self) -> dict[str, Any] | None:
        """What ``fit`` recorded of the run that is finished, with the seconds of all its starts; None if none is."""
        for run in reversed(RunFolder.all(self.path.parent, self.path.name)):
            starts = sorted(map(read_json, run.path.glob("run*.json")), key=lambda start: start.get("started", ""))
            finished = [start for start in starts if start.get("status") == "finished"]
            if finished:
                seconds = {key: sum(start.get(key, 0) for start in starts) for key in ("seconds", "device_hours")}
                # One that had nothing left but the test knows nothing of the training.
                metrics = {name: value for start in starts for name, value in start.get("metrics", {}).items()}
                facts = {"metrics": metrics, "starts": len(starts), "folder": str(run.path)}
                return {**finished[-1], **seconds, **facts}
        return None

    @property
    def inspected(self) -> dict[str, Any] | None:
        """What ``evaluate`` recorded, None if it has not finished."""
        path = self._inspection_path
        found = {} if path is None else read_json(path)
        return found if found.get("status") == "finished" else None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.record is not None and (not self.inspection or self.inspected is not None)

    @property
    def failure(self) -> str | None:
        """Why the last start has failed; None if it has not."""
        error = read_json(self.path / "failed.json").get("error")
        return error if error and not self.finished else None

    @property
    def wall_seconds(self) -> float:
        """How long its processes took, over all starts."""
        return read_json(self.path / "wall.json").get("seconds", 0.0)

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on with, the newest; half a file, as power cuts leave, is none."""
        found = [last for run in RunFolder.all(self.path.parent, self.path.name) if (last := run.last())]
        return bool(found) and zipfile.is_zipfile(found[-1])

    @property
    def _inspection_path(self) -> Path | None:
        return self.path / f"inspection-{digest(self.inspection)}.json" if self.inspection else None

    def run(self, processes: Processes, environment: Mapping[str, str] | None = None, attempts: int = 3) -> None:
        """Do what is left: train, or go on from the last checkpoint, then inspect.

        A process of an earlier start that still works on the cell is waited for. One that a signal has killed, or that
        has left before its end, is started again, as long as there are attempts left.

        Args:
            processes: start its processes.
            environment: variables that are set in addition.
            attempts: starts in all.

        Raises:
            CellFailedError: a process has ended with an error.
        """
        # Of the process that started this one: its seed, and its place among a job's tasks, which would become ranks.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
        variables = {**inherited, **(environment or {})}
        with locked(self.path / "lock", lambda: not processes.stopped) as lock:
            (self.path / "failed.json").unlink(missing_ok=True)
            while (step := self._next()) is not None and not processes.stopped:
                program, arguments = step
                if program == "evaluate" and self._inspection_path is not None:
                    self._inspection_path.unlink(missing_ok=True)  # of an evaluation that did not end
                start = time.monotonic()
                code = processes.call([*self.commands[program], *arguments], self.path / "log.txt", lock, variables)
                wall = self.wall_seconds + time.monotonic() - start
                write_json(self.path / "wall.json", {"seconds": round(wall, 3)})
                attempts -= 1
                left = (self._next() or ("",))[0] == program
                # Lightning ends with 0 where it was asked to end.
                if left and not processes.stopped and (code > 0 or attempts <= 0):
                    raise self._failed(program, code)

    def _next(self) -> tuple[str, list[str]] | None:
        """Give the program that comes next, and its arguments; None if nothing is left to do."""
        record, inspection = self.record, self._inspection_path
        if record is None:
            place = ["--name", self.path.name, "--trainer.default_root_dir", str(self.path.parent)]
            resume = ["--ckpt_path", "last"] if self.begun else []
            return "fit", ["--config", str(self.path / "cell.yaml"), *place, *resume]
        if inspection is None or self.inspected is not None:
            return None
        options = [word for key, value in self.inspection.items() for word in (f"--{key}", value)]
        return "evaluate", [
            "--config",
            str(Path(record["folder"]) / "config.yaml"),
            "--output",
            str(inspection),
            *options,
        ]

    def _failed(self, program: str, code: int) -> CellFailedError:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        lines = (self.path / "log.txt").read_text(errors="replace").splitlines()[-LINES:]
        error = "\n".join([f"{program} {how}; {self.path / 'log.txt'} ends with", *lines])
        self.fail(error)
        return CellFailedError(error)

    def fail(self, error: str) -> None:
        """Note why it has failed."""
        write_json(self.path / "failed.json", {"error": error})


@contextmanager
def locked(path: Path, wait: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Hold a lock, which ends with the last process that has it, however that ends.

    Args:
        path: the lock's file; it holds the number of the process.
        wait: says whether to wait on for another one to let it go.

    Yields:
        The file descriptor, to hand on.

    Raises:
        BlockingIOError: another process holds it, and nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait():
                    raise
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()
