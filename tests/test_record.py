import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dyn_lightning.record import PACKAGES, Record, RunFolder, device_name, git_state, packages

CPU = torch.device("cpu")


class TestRunFolder:
    def make(self, root: Path, *names: str) -> None:
        for name in names:
            (root / "digits" / name).mkdir(parents=True)

    @pytest.mark.parametrize(
        ("existing", "number"),
        [
            ([], 0),
            (["version_0"], 1),
            (["version_0", "version_4"], 5),
            ([f"version_{number}" for number in range(11)], 11),
            (["version_2", "version_x", "version_", "version_7-old", "other_9", "9"], 3),
        ],
        ids=["none", "one", "gap", "ten", "foreign"],
    )
    def test_new_takes_the_next_number(self, existing: list[str], number: int, tmp_path: Path) -> None:
        self.make(tmp_path, *existing)
        run = RunFolder.new(tmp_path, "digits")
        assert run.path == tmp_path / "digits" / f"version_{number}"
        assert run.number == number
        assert run.checkpoints == run.path / "checkpoints"
        assert not run.path.exists()

    def test_claims_are_never_shared(self, tmp_path: Path) -> None:
        """Runs that start at the same moment see the same next number."""
        runs = [RunFolder.new(tmp_path, "digits") for _ in range(4)]
        with ThreadPoolExecutor() as pool:
            claimed = list(pool.map(RunFolder.claim, runs))
        assert sorted(run.number for run in claimed) == [0, 1, 2, 3]
        assert all(run.path.is_dir() for run in claimed)

    def test_giving_back_removes_what_is_empty(self, tmp_path: Path) -> None:
        first, second = (RunFolder.new(tmp_path / "runs", "digits").claim() for _ in range(2))
        (first.path / "run.json").touch()
        first.give_back()
        second.give_back()
        assert first.path.is_dir()
        assert not second.path.exists()
        (first.path / "run.json").unlink()
        first.give_back()
        assert list(tmp_path.iterdir()) == []

    def test_all_is_in_the_order_of_numbers(self, tmp_path: Path) -> None:
        self.make(tmp_path, "version_10", "version_9", "version_0", "version_100", "version_x")
        assert [run.number for run in RunFolder.all(tmp_path, "digits")] == [0, 9, 10, 100]

    def test_newest_has_the_highest_number_among_those_with_a_checkpoint(self, tmp_path: Path) -> None:
        for number in (10, 9):
            checkpoints = tmp_path / "digits" / f"version_{number}" / "checkpoints"
            checkpoints.mkdir(parents=True)
            (checkpoints / "last.ckpt").touch()
        self.make(tmp_path, "version_11")  # stopped before its first checkpoint
        assert RunFolder.newest(tmp_path, "digits").number == 10

    def test_other_names_do_not_count(self, tmp_path: Path) -> None:
        self.make(tmp_path, "version_5")
        assert RunFolder.new(tmp_path, "flowers").number == 0

    @pytest.mark.parametrize("existing", [[], ["version_0"]], ids=["no run", "no checkpoint"])
    def test_there_is_no_newest(self, existing: list[str], tmp_path: Path) -> None:
        self.make(tmp_path, *existing)
        with pytest.raises(ValueError, match=f"no run below {tmp_path / 'digits'} has a checkpoint: start without"):
            RunFolder.newest(tmp_path, "digits")

    def test_last_is_the_one_written_last(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "version_0")
        run.checkpoints.mkdir(parents=True)
        assert run.last() is None
        for age, name in enumerate(["last.ckpt", "last-v1.ckpt", "best.ckpt"]):
            (run.checkpoints / name).touch()
            os.utime(run.checkpoints / name, (age, age))
        assert run.last() == run.checkpoints / "last-v1.ckpt"

    def test_best_is_what_the_last_checkpoint_says_also_in_a_moved_folder(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "version_0")
        run.checkpoints.mkdir(parents=True)
        assert run.best() is None
        for name in ("best-epoch=1.ckpt", "best-epoch=7.ckpt"):
            (run.checkpoints / name).touch()
        states = {
            "ModelCheckpoint{last}": {"monitor": None, "best_model_path": str(run.checkpoints / "last.ckpt")},
            "ModelCheckpoint{best}": {"monitor": "val/top1", "best_model_path": "/elsewhere/best-epoch=1.ckpt"},
        }
        torch.save({"callbacks": states}, run.checkpoints / "last.ckpt")
        assert run.best() == run.checkpoints / "best-epoch=1.ckpt"

    def test_unused_names(self, tmp_path: Path) -> None:
        run, given = RunFolder(tmp_path), []
        for _ in range(3):
            given.append(run.unused("config.yaml").name)
            run.unused("config.yaml").touch()
        assert given == ["config.yaml", "config-1.yaml", "config-2.yaml"]
        assert run.unused("run.json").name == "run.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf8"))


class TestRecord:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "run.json"

    def test_is_there_while_it_runs(self, path: Path) -> None:
        record = Record(path, CPU, 2, seed=3, resumed_from=None)
        assert not path.exists()
        with record:
            facts = read(path)
        assert facts["status"] == "running"
        assert (facts["devices"], facts["seed"], facts["resumed_from"]) == (2, 3, None)
        assert set(facts) == {
            *("status", "command", "started", "git", "packages", "python", "device", "devices"),
            *("seed", "resumed_from"),
        }

    def test_says_how_it_ended(self, path: Path) -> None:
        with Record(path, CPU, 1) as record:
            record.facts["metrics"] = {"val/top1": 0.5}
        facts = read(path)
        assert facts == record.facts
        assert facts["status"] == "finished"
        assert facts["metrics"] == {"val/top1": 0.5}
        assert facts["peak_memory_bytes"]["host"] > 2**20

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (ValueError("too small: ä"), "failed: ValueError: too small: ä"),
            (KeyboardInterrupt(), "failed: KeyboardInterrupt: "),
            (SystemExit(2), "failed: SystemExit: 2"),
        ],
    )
    def test_says_why_it_failed(self, error: BaseException, status: str, path: Path) -> None:
        with pytest.raises(type(error)), Record(path, CPU, 1):
            raise error
        facts = read(path)
        assert facts["status"] == status
        assert facts["seconds"] >= 0

    @pytest.mark.parametrize("devices", [1, 8])
    def test_device_hours(self, devices: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([100.0, 1900.0])
        monkeypatch.setattr(time, "monotonic", lambda: next(times))
        with Record(path, CPU, devices):
            pass
        facts = read(path)
        assert facts["seconds"] == 1800
        assert facts["device_hours"] == devices * 0.5

    def test_seconds_are_measured(self, path: Path) -> None:
        with Record(path, CPU, 1):
            time.sleep(0.05)
        assert 0.05 <= read(path)["seconds"] < 5

    def test_is_never_half_written(self, path: Path) -> None:
        """What cannot be written leaves what was written before."""
        with pytest.raises(TypeError), Record(path, CPU, 1) as record:
            record.facts["object"] = object()
        assert read(path)["status"] == "running"

    def test_is_replaced_in_one_step(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the new text lies whole beside it, the old one is still there."""
        seen, replace = [], os.replace

        def look(source: Path, target: Path) -> None:
            seen.append((target.exists() and read(target)["status"], read(source)["status"]))
            replace(source, target)

        monkeypatch.setattr(os, "replace", look)
        with Record(path, CPU, 1):
            pass
        assert seen == [(False, "running"), ("running", "finished")]
        assert [file.name for file in path.parent.iterdir()] == ["run.json"]

    def test_is_json_even_where_a_metric_is_no_number(self, path: Path) -> None:
        """NaN is no JSON: other programs refuse the whole file."""
        with Record(path, CPU, 1) as record:
            record.facts["metrics"] = {"val/loss": float("nan"), "val/top1": 0.5}
        found = []
        facts = json.loads(path.read_text(), parse_constant=found.append)
        assert found == []
        assert facts["metrics"]["val/top1"] == 0.5

    def test_other_ranks_write_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with Record(None, CPU, 2) as record:
            pass
        assert record.facts["status"] == "finished"
        assert list(tmp_path.iterdir()) == []


class TestGit:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder below no repository, and no settings but those made here."""
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        for name in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{name}_NAME", "A")
            monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.fixture
    def commit(self, folder: Path) -> str:
        """A repository with one file."""
        if shutil.which("git") is None:
            pytest.skip("git is not installed")
        (folder / "a.py").write_text("a = 1\n")
        for arguments in (["init", "--quiet"], ["add", "a.py"], ["commit", "--quiet", "--message", "first"]):
            subprocess.run(["git", *arguments], check=True)
        return subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    def test_clean(self, commit: str) -> None:
        assert git_state() == {"commit": commit, "status": "", "diff": ""}

    def test_dirty(self, folder: Path, commit: str) -> None:
        (folder / "a.py").write_text("a = 2\n")
        (folder / "b.py").touch()
        state = git_state()
        assert state["commit"] == commit
        assert state["status"].splitlines() == [" M a.py", "?? b.py"]
        assert "\n-a = 1\n+a = 2\n" in state["diff"]

    def test_staged(self, folder: Path, commit: str) -> None:
        (folder / "a.py").write_text("a = 3\n")
        subprocess.run(["git", "add", "a.py"], check=True)
        assert "+a = 3" in git_state()["diff"]

    def test_the_diff_can_be_written_whatever_it_holds(self, folder: Path, commit: str) -> None:
        (folder / "a.py").write_bytes(b"a = '\xff\xfe'\n")
        with Record(folder / "run.json", CPU, 1):
            pass
        assert "a.py" in read(folder / "run.json")["git"]["diff"]

    def test_outside_a_repository(self, folder: Path) -> None:
        assert git_state() is None

    def test_before_the_first_commit(self, folder: Path) -> None:
        subprocess.run(["git", "init", "--quiet"], check=True)
        assert git_state() is None

    def test_without_git(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert git_state() is None


def test_packages() -> None:
    versions = packages()
    assert {"dyn-lightning", "torch", "pytorch-lightning"} <= set(versions) <= set(PACKAGES)
    assert torch.__version__.startswith(versions["torch"])


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyn_lightning.record.PACKAGES", ("torch", "nowhere-to-be-found"))
    assert list(packages()) == ["torch"]


def test_device_name() -> None:
    name = device_name(CPU)
    assert torch.cuda.is_available() or f"{torch.get_num_threads()} threads" in name
