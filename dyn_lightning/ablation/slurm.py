"""Runs the cells of a study as the jobs of a SLURM array, through submitit."""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dyn_lightning.ablation.cell import CellFailedError, CellFolder, Processes
from dyn_lightning.ablation.launch import Job
from dyn_lightning.record import read_json, write_json

ASK_EVERY = 2.0  # seconds; the controller answers for all jobs at once
TIMEOUTS = 100  # after which a cell that reaches its time limit is not queued again
DEFAULTS = {"timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1}


class CellJob:
    """What a job does; submitit calls ``checkpoint`` before the time limit or a preemption, and queues it again.

    Args:
        cell: to run.
    """

    def __init__(self, cell: CellFolder) -> None:
        self.cell = cell

    def __call__(self) -> None:
        """Run the cell; why it has failed is noted in its folder."""
        # SLURM ends a job by its process groups: none may leave them.
        self.processes = Processes(sessions=False)
        try:
            # In a thread, so that signals find this one free.
            with ThreadPoolExecutor(1) as executor:
                executor.submit(self.cell.run, self.processes).result()
        except CellFailedError:
            pass
        except Exception as error:
            if not self.processes.stopped:
                self.cell.fail(f"{type(error).__name__}: {error}")

    def checkpoint(self) -> Any:
        """End the cell, and say what goes on with it."""
        import submitit

        self.processes.stop(patience=20)
        return submitit.helpers.DelayedSubmission(CellJob(self.cell))

    __submitit_checkpoint__ = checkpoint  # its newer name


class Slurm:
    """Runs each cell as a job. When it is left, they go on: the next start follows those that are still there.

    Args:
        folder: for submitit's files; the nodes must see it, and the folders of the cells.
        jobs: at most so many run at a time.
        name: of the jobs.
        options: parameters of ``submitit.AutoExecutor`` (``timeout_min``, ``gpus_per_node``, ``slurm_partition``, ...).

    Raises:
        ValueError: there is no submitit or no SLURM, or an option that submitit does not know.
    """

    def __init__(self, folder: Path, jobs: int, name: str, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError("launcher=slurm needs submitit: pip install 'dyn-lightning[slurm]'") from error
        if shutil.which("sbatch") is None:
            raise ValueError("launcher=slurm: there is no SLURM here (no command sbatch)")
        self.folder = folder
        self._executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
        try:
            self._executor.update_parameters(**{**DEFAULTS, "name": name, "slurm_array_parallelism": jobs, **options})
        except (NameError, TypeError, AssertionError) as error:
            raise ValueError(f"slurm={dict(options)}: {error}") from error
        self._asked = -ASK_EVERY
        self._states: dict[str, str] = {}

    def submit(self, cells: Sequence[CellFolder]) -> Sequence[Job]:
        """Queue the cells as one array, but for those whose job of an earlier start is still there."""
        if not cells:
            return []  # without a question to the controller: the loop comes by several times a second
        states = self._ask()
        known = [read_json(cell.path / "job.json").get("id", "") for cell in cells]
        left = [cell for cell, number in zip(cells, known, strict=True) if number not in states]
        if left:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._executor.batch():
                submitted = [self._executor.submit(CellJob(cell)) for cell in left]
            for cell, job in zip(left, submitted, strict=True):
                write_json(cell.path / "job.json", {"id": job.job_id})
                self._states[job.job_id] = "PENDING"  # until an answer that may know it
            self._asked = time.monotonic()
        return [SlurmJob(self, read_json(cell.path / "job.json")["id"]) for cell in cells]

    def states(self) -> dict[str, str]:
        """Give the states of this user's jobs that wait or run, by their numbers."""
        if time.monotonic() - self._asked > ASK_EVERY:
            with suppress(subprocess.CalledProcessError):  # the controller is busy: what it said last may still be so
                self._ask(patience=0)
            self._asked = time.monotonic()
        return self._states

    def _ask(self, patience: int = 30) -> dict[str, str]:
        """Ask the controller; one that is busy is asked again so many times."""
        command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i %T"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError:
            if patience == 0:
                raise
            time.sleep(ASK_EVERY)
            return self._ask(patience - 1)
        self._states = dict(line.split() for line in answer.stdout.splitlines())
        return self._states

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the jobs alone."""


class SlurmJob:
    """A job, by its number.

    Args:
        launcher: asks for its state.
        number: ``ARRAY_TASK``.
    """

    def __init__(self, launcher: Slurm, number: str) -> None:
        self.launcher = launcher
        self.number = number

    def done(self) -> bool:
        """Say whether it has ended, one way or the other."""
        return self.number not in self.launcher.states()

    def running(self) -> bool:
        """Say whether it works now."""
        return self.launcher.states().get(self.number) == "RUNNING"
