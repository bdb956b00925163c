import gc
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dyn_lightning.ablation import harness
from dyn_lightning.ablation.cell import CellFolder
from dyn_lightning.ablation.harness import Display, StudyFolder, duration, run
from dyn_lightning.ablation.launch import Job, Local
from dyn_lightning.ablation.study import Cell, Study
from tests.ablation.test_cell import cell, starts, wait_for

ASKED = Study("What?", [], {"a": {}})


def run_all(cells: Sequence[tuple[Cell, object]], jobs: int = 1) -> None:
    run(cells, Local(jobs), Display(cells, jobs, None))  # type: ignore[arg-type]


def pairs(folder: Path, *does: dict) -> list:
    return [
        (Cell("arm", seed, each, {}), cell(folder, f"arm-seed{seed}-abc", **each)) for seed, each in enumerate(does)
    ]


class TestLocal:
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_as_many_at_a_time_as_are_wanted(self, jobs: int, tmp_path: Path) -> None:
        cells, most = pairs(tmp_path, *[{"sleep": 0.5}] * 4), 0
        with Local(jobs) as launcher:
            submitted = launcher.submit([folder for _, folder in cells])
            while not all(job.done() for job in submitted):
                most = max(most, sum(job.running() for job in submitted))
                time.sleep(0.02)
        assert most == jobs
        assert all(folder.finished for _, folder in cells)

    def test_one_that_fails_stops_no_other(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        cells = pairs(tmp_path, {}, {"exit": 1}, {"signal": 9}, {})
        run_all(cells)
        assert [folder.finished for _, folder in cells] == [True, False, False, True]
        assert capsys.readouterr().out.splitlines() == [
            "1 of 4: arm, seed 0 finished after 0 s",
            "2 of 4: arm, seed 1 failed",
            "3 of 4: arm, seed 2 failed",
            "4 of 4: arm, seed 3 finished after 0 s",
        ]

    def test_what_goes_wrong_here_is_noted_too(self, tmp_path: Path) -> None:
        ((one, folder),) = pairs(tmp_path, {})
        folder = CellFolder(folder.path, commands={"fit": ("/no/such/program",)})
        run_all([(one, folder)])
        assert folder.failure is not None
        assert "FileNotFoundError" in folder.failure
        assert "/no/such/program" in folder.failure

    def test_a_report_that_fails_stops_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "REPORT_EVERY", 0)
        cells = pairs(tmp_path, {}, {})

        def fails() -> None:
            raise OSError("no space left")

        run(cells, Local(), Display(cells, 1, None), fails)
        assert all(folder.finished for _, folder in cells)
        assert "no report now: OSError: no space left" in capsys.readouterr().out

    def test_an_interrupt_ends_what_runs_and_starts_nothing_more(self, tmp_path: Path) -> None:
        cells = pairs(tmp_path, *[{"sleep": 60}] * 3)

        class Interrupted(Display):
            def show(self, jobs: Sequence[Job], ended: set[int]) -> None:
                wait_for(lambda: starts(cells[0][1]))
                raise KeyboardInterrupt

        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(cells, Local(), Interrupted(cells, 1, None))
        assert time.monotonic() - begun < 20
        assert [starts(folder) for _, folder in cells] == [1, 0, 0]
        assert [folder.failure for _, folder in cells] == [None] * 3

    def test_cores_are_shared_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        cells = pairs(tmp_path, {}, {})
        launcher = Local(2)
        run(cells, launcher, Display(cells, 2, None))
        for _, folder in cells:
            assert (folder.path / "starts").read_text().split()[-1] == str(launcher.threads)

    def test_gpus_are_shared_out_where_they_are_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        seen = []

        class Cell(CellFolder):
            def run(self, processes: Any, environment: Any = None, attempts: int = 3) -> None:
                seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
                time.sleep(0.3)

        for launcher in (Local(2, 2, gpu=True), Local(1, 4, gpu=True), Local(8, 1, gpu=False)):
            with launcher:
                jobs = launcher.submit([Cell(tmp_path), Cell(tmp_path)])
                wait_for(lambda: all(job.done() for job in jobs))  # noqa: B023 - called at once
        assert sorted(seen[:2]) == ["0,1", "2,3"]
        assert seen[2:] == [None] * 4
        with pytest.raises(ValueError, match="jobs=3 with 2 devices each need 6 GPUs, there are 4"):
            Local(3, 2, gpu=True)

    def test_refuses_no_jobs(self) -> None:
        with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
            Local(0)


def test_many_cells(tmp_path: Path) -> None:
    """200 trivial cells cost little time and no memory."""
    cells = pairs(tmp_path, *[{}] * 200)
    run_all(cells[:20], 2)
    gc.collect()
    before, start = resident(), time.monotonic()
    run_all(cells, 2)
    assert all(folder.finished for _, folder in cells)
    gc.collect()
    assert resident() - before < 20 << 20
    assert time.monotonic() - start < 0.5 * 200


def resident() -> int:
    """Give the bytes that this process holds now: its peak may lie in an earlier test."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class TestStudyFolder:
    def test_is_for_one_process(self, tmp_path: Path) -> None:
        (file := tmp_path / "a.yaml").write_text("question: x\n")
        folder = StudyFolder(tmp_path / "out", "a", ASKED)
        with (
            folder.claimed(file),
            pytest.raises(ValueError, match=r"process \d+ works on this study"),
            folder.claimed(file),
        ):
            pass

    def test_keeps_each_version_of_the_file(self, tmp_path: Path) -> None:
        folder, file = StudyFolder(tmp_path / "out", "a", ASKED), tmp_path / "a.yaml"
        for text in ("question: x\n", "question: x\n", "question: y\n"):
            file.write_text(text)
            folder.check()
            with folder.claimed(file):
                pass
        copies = {path.name: path.read_text() for path in (tmp_path / "out").glob("study*.yaml")}
        assert copies == {"study.yaml": "question: x\n", "study-1.yaml": "question: y\n"}

    def test_one_that_was_killed_at_its_first_moment_goes_on(self, tmp_path: Path) -> None:
        (out := tmp_path / "out").mkdir()
        (out / "lock").write_text("77\n")
        StudyFolder(out, "a", ASKED).check()

    def test_refuses_another_study_s(self, tmp_path: Path) -> None:
        (file := tmp_path / "a.yaml").write_text("question: x\n")
        with StudyFolder(tmp_path / "out", "a", ASKED).claimed(file):
            pass
        with pytest.raises(ValueError, match=r"is of another study, 'a' \(What\?\): choose another folder"):
            StudyFolder(tmp_path / "out", "b", ASKED).check()

    def test_one_of_the_same_name_may_be_another(self, tmp_path: Path) -> None:
        """Its question or its arms may change, but not both."""
        (file := tmp_path / "a.yaml").write_text("question: x\n")
        with StudyFolder(tmp_path / "out", "a", ASKED).claimed(file):
            pass
        StudyFolder(tmp_path / "out", "a", Study("Why?", [], ASKED.arms)).check()
        StudyFolder(tmp_path / "out", "a", Study("What?", [], {"b": {}})).check()
        with pytest.raises(ValueError, match="is of another study, 'a'"):
            StudyFolder(tmp_path / "out", "a", Study("Why?", [], {"b": {}})).check()

    def test_refuses_a_folder_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(ValueError, match="exists and holds no study"):
            StudyFolder(tmp_path, "a", ASKED).check()

    def test_cells_of_an_earlier_version_are_noticed(self, tmp_path: Path) -> None:
        cells = [Cell("an arm", seed, {"lr": 0.1}, {}) for seed in (1, 2)]
        earlier = [Cell("an arm", 1, {"lr": 0.2}, {}), Cell("gone", 1, {"lr": 0.1}, {})]
        another_seed = Cell("an arm", 3, {"lr": 0.1}, {})
        for each in (*cells, *earlier, another_seed):
            (tmp_path / "cells" / each.name).mkdir(parents=True)
            (tmp_path / "cells" / each.name / "lock").touch()
        (tmp_path / "cells" / Cell("never begun", 1, {}, {}).name).mkdir()
        found = StudyFolder(tmp_path, "a", ASKED).left_aside(cells)
        assert found == sorted(each.name for each in earlier)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
