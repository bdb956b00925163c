import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dyn_lightning.ablation.cell import CellFailedError, CellFolder, Processes, locked

TRIVIAL = {"fit": (sys.executable, "-S", "-I", str(Path(__file__).with_name("trivial.py")))}


def cell(folder: Path, name: str = "arm-seed1-abc", **does: Any) -> CellFolder:
    path = folder / "cells" / name
    path.mkdir(parents=True)
    (path / "cell.yaml").write_text(json.dumps(does))
    return CellFolder(path, commands=TRIVIAL)


def starts(folder: CellFolder) -> int:
    path = folder.path / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class TestRun:
    def test_leaves_a_record(self, tmp_path: Path) -> None:
        folder = cell(tmp_path, value=0.75)
        assert not folder.finished
        folder.run(Processes())
        assert folder.finished
        assert folder.record is not None
        assert folder.record["metrics"] == {"test/top1": 0.75}
        assert folder.failure is None

    def test_what_is_finished_is_not_run_again(self, tmp_path: Path) -> None:
        folder = cell(tmp_path)
        for _ in range(3):
            folder.run(Processes())
        assert starts(folder) == 1

    def test_an_error_is_told_with_the_end_of_the_log(self, tmp_path: Path) -> None:
        folder = cell(tmp_path, exit=3)
        with pytest.raises(CellFailedError, match=r"fit ended with exit code 3;.*log.txt ends with\nstarted 1"):
            folder.run(Processes())
        assert folder.failure is not None
        assert starts(folder) == 1

    def test_what_has_failed_can_be_run_again(self, tmp_path: Path) -> None:
        folder = cell(tmp_path, exit=3, times=1)
        with pytest.raises(CellFailedError):
            folder.run(Processes())
        folder.run(Processes())
        assert folder.finished
        assert folder.failure is None

    def test_no_record_is_an_error(self, tmp_path: Path) -> None:
        folder = cell(tmp_path, exit=0)
        with pytest.raises(CellFailedError, match="fit ended with exit code 0"):
            folder.run(Processes())

    def test_one_that_is_killed_goes_on(self, tmp_path: Path) -> None:
        folder = cell(tmp_path, signal=signal.SIGKILL, times=2)
        folder.run(Processes())
        assert folder.finished
        assert starts(folder) == 3

    @pytest.mark.parametrize(("half", "resumed"), [(False, ["", "last"]), (True, ["", ""])])
    def test_goes_on_from_a_whole_checkpoint_alone(self, half: bool, resumed: list[str], tmp_path: Path) -> None:
        folder = cell(tmp_path, signal=signal.SIGKILL, times=1, half=half)
        folder.run(Processes())
        assert folder.finished
        lines = (folder.path / "starts").read_text().splitlines()
        assert [line.split(" ")[1] for line in lines] == resumed

    def test_one_that_was_asked_to_end_goes_on(self, tmp_path: Path) -> None:
        """Lightning then ends with exit code 0."""
        folder = cell(tmp_path, exit=0, times=1)
        folder.run(Processes())
        assert folder.finished
        assert starts(folder) == 2

    def test_metrics_of_all_starts(self, tmp_path: Path) -> None:
        """One that is killed in its test is started again for the test alone, after `run-1.json` and before 2 to 10."""
        folder = cell(tmp_path)
        folder.run(Processes())
        run = folder.path / "version_0"
        for number, metrics in ((2, {"val/top1": 0.1, "a": 1}), (10, {"val/top1": 0.2}), (1, {"val/top1": 0.3})):
            started = {2: "2026-01-01T10", 10: "2026-01-01T11", 1: "2026-01-01T09"}[number]
            start = {"status": "running", "started": started, "metrics": metrics}
            (run / f"run-{number}.json").write_text(json.dumps(start))
        assert folder.record is not None
        assert folder.record["metrics"] == {"test/top1": 0.5, "val/top1": 0.2, "a": 1}

    def test_not_for_ever(self, tmp_path: Path) -> None:
        folder = cell(tmp_path, signal=signal.SIGKILL)
        with pytest.raises(CellFailedError, match="fit was killed by signal 9"):
            folder.run(Processes())
        assert starts(folder) == 3

    def test_not_for_ever_in_its_second_program(self, tmp_path: Path) -> None:
        """The attempts that the first one took are not given back."""
        folder = cell(tmp_path, signal=signal.SIGKILL, times=2)
        killed = (sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)")
        folder = CellFolder(folder.path, {"draws": "2"}, {**TRIVIAL, "evaluate": killed})
        with pytest.raises(CellFailedError, match="evaluate was killed by signal 9"):
            folder.run(Processes())
        assert starts(folder) == 3

    @pytest.mark.parametrize("name", ["version_0/run.json", "wall.json", "failed.json"])
    def test_a_file_that_a_power_cut_left_empty(self, name: str, tmp_path: Path) -> None:
        folder = cell(tmp_path)
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).touch()
        folder.run(Processes())
        assert folder.finished

    @pytest.mark.parametrize("sessions", [True, False])
    def test_what_it_leaves_behind_is_ended_with_it(self, sessions: bool, tmp_path: Path) -> None:
        """As of several processes that train together, of which the first was killed."""
        script = "import os, subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); os.abort()"
        folder = CellFolder(cell(tmp_path).path, commands={"fit": (sys.executable, "-S", "-c", script)})
        with pytest.raises(CellFailedError):
            folder.run(Processes(sessions), attempts=1)
        child = int((folder.path / "log.txt").read_text().split()[0])
        wait_for(
            lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
        )

    def test_one_that_does_not_listen_is_killed(self, tmp_path: Path) -> None:
        deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        script = f"{deaf}print('on', flush=True); time.sleep(60)"
        folder = CellFolder(cell(tmp_path).path, commands={"fit": (sys.executable, "-S", "-c", script)})
        processes, begun = Processes(), time.monotonic()
        thread = threading.Thread(target=folder.run, args=[processes])
        thread.start()
        wait_for(lambda: (folder.path / "log.txt").is_file() and (folder.path / "log.txt").read_text())
        processes.stop(patience=0.2)
        thread.join(timeout=10)
        assert time.monotonic() - begun < 20
        assert not thread.is_alive()

    def test_it_can_be_stopped(self, tmp_path: Path) -> None:
        folder, processes = cell(tmp_path, sleep=60), Processes()
        thread = threading.Thread(target=folder.run, args=[processes])
        thread.start()
        wait_for(lambda: starts(folder))
        processes.stop()
        thread.join(timeout=10)
        assert not thread.is_alive()
        assert starts(folder) == 1
        assert folder.failure is None
        assert not folder.finished

    def test_the_seed_of_this_process_is_not_handed_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "77")
        folder = cell(tmp_path)
        script = "import os, sys; print('seed', os.environ.get('PL_GLOBAL_SEED'), os.environ['MINE']); sys.exit(1)"
        folder = CellFolder(folder.path, commands={"fit": (sys.executable, "-c", script)})
        with pytest.raises(CellFailedError, match="seed None yes"):
            folder.run(Processes(), {"MINE": "yes"})


class TestLock:
    def test_is_for_one(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "lock"
        with locked(path):
            assert path.read_text() == f"{os.getpid()}\n"
            with pytest.raises(BlockingIOError), locked(path):
                pass
        with locked(path):
            pass

    def test_waiting_ends_when_nobody_wants_it(self, tmp_path: Path) -> None:
        folder, processes = cell(tmp_path), Processes()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                folder.run(processes)
            except BlockingIOError as error:
                failed.append(error)

        with locked(folder.path / "lock"):
            thread = threading.Thread(target=run)
            thread.start()
            time.sleep(0.3)
            processes.stop()
            thread.join(timeout=10)
        assert len(failed) == 1
        assert starts(folder) == 0

    def test_a_process_that_outlives_its_parent_is_waited_for(self, tmp_path: Path) -> None:
        """The parent is killed; its child works on, and is not started twice."""
        folder = cell(tmp_path, sleep=1.5)
        script = (
            "import sys; from pathlib import Path; from tests.ablation.test_cell import *; "
            f"CellFolder(Path({str(folder.path)!r}), commands=TRIVIAL).run(Processes())"
        )
        root = Path(__file__).parents[2]
        parent = subprocess.Popen([sys.executable, "-c", script], cwd=root)
        wait_for(lambda: starts(folder))
        parent.kill()
        parent.wait()
        assert not folder.finished
        folder.run(Processes())
        assert folder.finished
        assert starts(folder) == 1
