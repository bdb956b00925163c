"""Where the cells of a study run."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

import torch

from dyn_lightning.ablation.cell import CellFailedError, CellFolder, Processes


class Job(Protocol):
    """A cell that was submitted."""

    def done(self) -> bool:
        """Say whether it has ended, one way or the other."""

    def running(self) -> bool:
        """Say whether it works now."""


class Launcher(Protocol):
    """Runs cells somewhere, inside its context."""

    def submit(self, cells: Sequence[CellFolder]) -> Sequence[Job]:
        """Start the cells, or let them wait for their turn."""

    def __enter__(self) -> "Launcher":
        """Make ready."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Say what becomes of what still runs."""


class Local:
    """Runs some cells at a time on this machine; what still runs when it is left by an error is ended.

    Of several that run on GPUs each has as many as a cell takes for itself; processor cores are shared out evenly,
    unless ``OMP_NUM_THREADS`` is set.

    Args:
        jobs: how many at a time.
        devices: of each cell.
        gpu: whether these are GPUs.

    Raises:
        ValueError: there are not as many GPUs, or no job.
    """

    def __init__(self, jobs: int = 1, devices: int = 1, gpu: bool = False) -> None:
        gpus = torch.cuda.device_count() if gpu and jobs > 1 else 0
        if jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        if gpus and jobs * devices > gpus:
            raise ValueError(f"jobs={jobs} with {devices} devices each need {jobs * devices} GPUs, there are {gpus}")
        self.jobs = jobs
        self.threads = max(1, (os.cpu_count() or 1) // (jobs * devices))
        self._executor = ThreadPoolExecutor(jobs)
        self._processes = Processes()
        self._places: SimpleQueue[str | None] = SimpleQueue()  # the numbers of the GPUs of each job
        known = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        for job in range(jobs):
            self._places.put(",".join(known[job * devices : (job + 1) * devices]) if gpus else None)

    def submit(self, cells: Sequence[CellFolder]) -> Sequence[Job]:
        """Put the cells in a queue."""
        return [self._executor.submit(self._run, cell) for cell in cells]

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        if kind is not None:
            self._processes.stop()
        self._executor.shutdown()

    def _run(self, cell: CellFolder) -> None:
        place = self._places.get()
        environment = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        try:
            cell.run(self._processes, environment)
        except CellFailedError:
            pass  # it is noted
        except Exception as error:
            if not self._processes.stopped:
                cell.fail(f"{type(error).__name__}: {error}")
        finally:
            self._places.put(place)
