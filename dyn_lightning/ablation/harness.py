"""A study's folder, and the loop that runs its cells; whatever stops it, it goes on where it was."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from rich.console import Console

from dyn_lightning.ablation.cell import CellFolder, locked
from dyn_lightning.ablation.launch import Job, Launcher
from dyn_lightning.ablation.study import Cell, Study
from dyn_lightning.record import RunFolder, read_json, write_json, write_whole

LOOK_EVERY = 0.2  # seconds
REPORT_EVERY = 30.0  # seconds, while cells run
STARTS = 3  # of a cell whose jobs end without a word

Pairs = Sequence[tuple[Cell, CellFolder]]


class StudyFolder:
    """``OUTPUT``: the study as it was given, a folder a cell, and the report.

    Args:
        path: the folder; it need not exist.
        name: of the study.
        study: what is asked.
    """

    def __init__(self, path: Path, name: str, study: Study) -> None:
        self.path = path
        self.name = name
        self.what = {"name": name, "question": study.question, "arms": list(study.arms)}
        self.note = path / "study.json"

    def check(self) -> None:
        """Check that it is new or this study's.

        Raises:
            ValueError: it holds something else.
        """
        before = {**self.what, **read_json(self.note)}
        changed = [key for key in ("question", "arms") if before[key] != self.what[key]]
        if before["name"] != self.name or len(changed) == 2:  # one alone may change
            raise ValueError(
                f"--output {self.path} is of another study, {before['name']!r} ({before['question']}): choose another "
                "folder"
            )
        inside = [path.name for path in self.path.iterdir() if path.name != "lock"] if self.path.is_dir() else []
        if self.path.is_file() or (inside and not any(each.startswith(self.note.name) for each in inside)):
            raise ValueError(f"--output {self.path} exists and holds no study: choose another folder")

    @contextmanager
    def claimed(self, file: Path) -> Iterator[None]:
        """Hold the folder for this process, with a copy of the study's file in it.

        Raises:
            ValueError: another process holds it.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / "lock"))
            except BlockingIOError as error:
                holder = (self.path / "lock").read_text().strip()
                raise ValueError(
                    f"--output {self.path}: process {holder} works on this study; wait for it, or choose another folder"
                ) from error
            write_json(self.note, self.what)
            copies = sorted(self.path.glob("study*.yaml"), key=lambda path: path.stat().st_mtime)
            if not copies or copies[-1].read_bytes() != file.read_bytes():
                write_whole(RunFolder(self.path).unused("study.yaml"), file.read_bytes())
            yield

    def cells(self, cells: Sequence[Cell], evaluation: Callable[[str], dict[str, str]]) -> list[CellFolder]:
        """Give each cell its folder; ``evaluation`` gives an arm's arguments of ``evaluate``."""
        return [CellFolder(self.path / "cells" / cell.name, evaluation(cell.arm)) for cell in cells]

    def left_aside(self, cells: Sequence[Cell]) -> list[str]:
        """List the cells of an earlier version of the study: of other configurations, or of arms that are no more."""
        arms, now = {cell.name.rpartition("-seed")[0] for cell in cells}, {cell.name for cell in cells}
        trained = {name.rpartition("-")[0] for name in now}
        found = sorted(path.name for path in (self.path / "cells").glob("*-seed*-*"))
        return [
            name
            for name in found
            if (self.path / "cells" / name / "lock").exists()  # else it was never begun
            and name not in now
            and (name.rpartition("-seed")[0] not in arms or name.rpartition("-")[0] in trained)
        ]


def run(pairs: Pairs, launcher: Launcher, display: "Display", report: Callable[[], None] = lambda: None) -> None:
    """Run the cells that are not finished.

    Args:
        pairs: cells with their folders.
        launcher: runs them.
        display: shows how far it is.
        report: is called from time to time when cells have ended.
    """
    for cell, folder in pairs:
        folder.path.mkdir(parents=True, exist_ok=True)
        config = folder.path / "cell.yaml"
        if not config.is_file():
            write_whole(config, yaml.safe_dump(dict(cell.config), sort_keys=False).encode())
    folders = [folder for _, folder in pairs]
    with launcher, display:
        jobs, starts = list(launcher.submit(folders)), [1] * len(pairs)
        settled, reported = set[int](), time.monotonic()
        while len(settled) < len(jobs):
            ended = [place for place, job in enumerate(jobs) if place not in settled and job.done()]
            # A job may end without a word, as when its node fails: it is started again, and goes on where it was.
            lost = [place for place in ended if not (folders[place].finished or folders[place].failure)]
            lost = [place for place in lost if starts[place] < STARTS]
            for place, job in zip(lost, launcher.submit([folders[place] for place in lost]), strict=True):
                jobs[place] = job
                starts[place] += 1
            settled.update(set(ended) - set(lost))
            display.show(jobs, settled)
            if ended and time.monotonic() - reported > REPORT_EVERY:
                try:
                    report()
                except Exception as error:  # which is not worth the cells that run
                    display.say(f"no report now: {type(error).__name__}: {error}")
                reported = time.monotonic()
            time.sleep(LOOK_EVERY)


class Display:
    """Shows how far a study is: a line that changes where there is a terminal, and a line for each cell that ends.

    Args:
        pairs: the cells that run, with their folders.
        at_a_time: how many.
        estimate: seconds a cell, as long as none has ended; None if nobody knows.
    """

    def __init__(self, pairs: Pairs, at_a_time: int, estimate: float | None) -> None:
        self.pairs = pairs
        self.at_a_time = at_a_time
        self.estimate = estimate
        self._status = Console(highlight=False, soft_wrap=True).status("")
        self._ended: set[int] = set()
        self._took: list[float] = []

    def __enter__(self) -> "Display":
        if self._status.console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._status.stop()

    def show(self, jobs: Sequence[Job], ended: set[int]) -> None:
        """Show what has changed; ``ended`` are the places of jobs that will not be started again."""
        for place in sorted(ended - self._ended):
            self._ended.add(place)
            self._end(place, len(jobs))
        running, left = sum(job.running() for job in jobs), len(jobs) - len(ended)
        each = statistics.fmean(self._took) if self._took else self.estimate
        to_go = "" if each is None else f", {duration(each * math.ceil(left / self.at_a_time))} to go"
        self._status.update(f"{len(ended)} done, {running} running, {left - running} waiting{to_go}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._status.console.print(text, markup=False)

    def _end(self, place: int, of: int) -> None:
        cell, folder = self.pairs[place]
        if folder.finished and folder.wall_seconds:  # not of one that worked on after its harness was killed
            self._took.append(folder.wall_seconds)
        took = f" after {duration(folder.wall_seconds)}"
        how = f"finished{took}" if folder.finished else "failed" if folder.failure else "stopped"
        self.say(f"{len(self._ended)} of {of}: {cell.arm}, seed {cell.seed} {how}")


def seconds_a_cell(folders: Sequence[CellFolder]) -> float | None:
    """Give the mean of the seconds that finished cells took; None if there are none."""
    took = [folder.wall_seconds for folder in folders if folder.finished and folder.wall_seconds]
    return statistics.fmean(took) if took else None


def duration(seconds: float) -> str:
    """Write seconds as people say them.

    Example:
        >>> duration(12), duration(75), duration(7260)
        ('12 s', '1 min 15 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
