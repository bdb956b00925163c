"""On a real SLURM, which the test starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dyn_lightning.ablation.harness import Display, run
from dyn_lightning.ablation.slurm import Slurm, SlurmJob
from tests.ablation.cluster import cluster, missing
from tests.ablation.test_cell import starts, wait_for
from tests.ablation.test_launch import pairs
from tests.command_line import SMALL, write_config
from tests.test_ablate import ARMS, cells_of, checkpoints, environment, results, write_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing()), reason=f"there is no SLURM here: {', '.join(missing())} (Debian: slurm-wlm, munge)"
    ),
]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with cluster(tmp_path_factory.mktemp("cluster")) as path:
        yield path


@pytest.fixture(autouse=True)
def _environment(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def slurm(folder: Path, jobs: int = 2, **options: Any) -> Slurm:
    return Slurm(folder / "slurm", jobs, "test", {"timeout_min": 5, "mem_gb": 0.2, **options})


class Watching(Display):
    """Does something once, when a condition holds."""

    when: Callable[[], bool]
    then: Callable[[list[SlurmJob]], None]
    done = False

    def show(self, jobs: Any, ended: set[int]) -> None:
        super().show(jobs, ended)
        if not self.done and self.when():
            self.done = True
            self.then(jobs)


def run_and(cells: list, launcher: Slurm, when: Callable[[], bool], then: Callable[[Any], None]) -> None:
    display = Watching(cells, 2, None)
    display.when, display.then = when, then
    run(cells, launcher, display)
    assert display.done


def scancel(job: SlurmJob, name: str) -> None:
    subprocess.run(["scancel", "--signal", name, job.number], check=True)


def test_an_array_of_which_one_fails(tmp_path: Path) -> None:
    cells = pairs(tmp_path, {}, {"exit": 3}, {})
    run(cells, slurm(tmp_path), Display(cells, 2, None))
    assert [folder.finished for _, folder in cells] == [True, False, True]
    assert "fit ended with exit code 3" in str(cells[1][1].failure)
    assert [starts(folder) for _, folder in cells] == [1, 1, 1]
    numbers = [(folder.path / "job.json").read_text() for _, folder in cells]
    assert len({number.partition("_")[0] for number in numbers}) == 1


def test_one_that_is_preempted_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    cells = pairs(tmp_path, {"sleep": 5})
    ((_, folder),) = cells

    def preempt(jobs: list[SlurmJob]) -> None:
        scancel(jobs[0], "USR2")
        for _ in range(60):  # SLURM lets it wait two minutes
            time.sleep(0.5)
            if jobs[0].launcher.states().get(jobs[0].number) == "PENDING":
                subprocess.run(["scontrol", "update", f"jobid={jobs[0].number}", "starttime=now"], check=True)
                return
        raise AssertionError(jobs[0].launcher.states())

    run_and(cells, slurm(tmp_path), lambda: starts(folder) == 1, preempt)
    assert folder.finished
    assert folder.failure is None
    lines = (folder.path / "starts").read_text().splitlines()
    assert [line.split(" ")[1] for line in lines] == ["", "last"]


def test_one_that_is_killed_is_started_again(tmp_path: Path) -> None:
    cells = pairs(tmp_path, {"sleep": 5}, {})
    ((_, folder), _) = cells
    run_and(cells, slurm(tmp_path), lambda: starts(folder) == 1, lambda jobs: scancel(jobs[0], "KILL"))
    assert all(each.finished for _, each in cells)
    assert starts(folder) > 1


def test_a_second_harness_follows_the_jobs_of_the_first(tmp_path: Path) -> None:
    cells = pairs(tmp_path, {"sleep": 5}, {"sleep": 5})
    with slurm(tmp_path, jobs=1) as launcher:
        first = launcher.submit([folder for _, folder in cells])
    second = slurm(tmp_path, jobs=1).submit([folder for _, folder in cells])
    assert [job.number for job in first] == [job.number for job in second]  # type: ignore[attr-defined]
    run(cells, slurm(tmp_path), Display(cells, 1, None))
    assert [starts(folder) for _, folder in cells] == [1, 1]


def test_a_controller_that_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as squeue fails, what was submitted is there; at a start there has to be an answer."""
    monkeypatch.setattr("dyn_lightning.ablation.slurm.ASK_EVERY", 0.0)
    cells, launcher = pairs(tmp_path, {"sleep": 3}), slurm(tmp_path)
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "squeue").write_text(f"#!/bin/sh\necho x >> {tmp_path}/asked\nexit 1\n")
    (busy / "squeue").chmod(0o755)
    (job,) = launcher.submit([folder for _, folder in cells])
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{busy}:{path}")
    assert not job.done()
    before = len((tmp_path / "asked").read_text().splitlines())
    assert launcher.submit([]) == []
    assert len((tmp_path / "asked").read_text().splitlines()) == before
    with ThreadPoolExecutor(1) as executor:
        again = executor.submit(slurm(tmp_path).submit, [folder for _, folder in cells])
        wait_for(lambda: len((tmp_path / "asked").read_text().splitlines()) > 3)
        monkeypatch.setenv("PATH", path)
        assert again.result()[0].number == job.number  # type: ignore[attr-defined]
    run(cells, slurm(tmp_path), Display(cells, 2, None))
    assert starts(cells[0][1]) == 1


def test_an_option_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"slurm={.*'timeout': 5.*}"):
        slurm(tmp_path, timeout=5)


def test_a_study(tmp_path: Path) -> None:
    write_config(tmp_path, config={**SMALL, "trainer": {**SMALL["trainer"], "max_epochs": 8, "accelerator": "auto"}})
    write_study(tmp_path, seeds=[1], inspect={"arms": ["dynamic"], "draws": 2})
    options = ["--launcher", "slurm", "--jobs", "2", "--slurm", "{timeout_min: 10, mem_gb: 0.2}"]
    command = [sys.executable, "-m", "dyn_lightning.ablate", "--config", "study.yaml", *options]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as harness:
        # A process that trains is asked to end, as before a preemption; Lightning leaves with exit code 0.
        wait_for(lambda: checkpoints(tmp_path) and cells_of(tmp_path), seconds=120)
        for process in cells_of(tmp_path):
            os.kill(process, signal.SIGTERM)
        assert harness.wait(timeout=300) == 0
    found = results(tmp_path)["cells"]
    assert [(row["arm"], row["status"]) for row in found] == [(arm, "finished") for arm in ARMS]
    assert len(found[1]["conditions"]) == 5
    assert max(row["starts"] for row in found) > 1
