"""The whole harness with real cells, as a user runs it."""

import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dyn_lightning.ablate import main
from dyn_lightning.data import Digits
from tests.ablation.test_cell import wait_for
from tests.command_line import ROOT, SMALL, fit, in_this_process, write_config
from tests.data.test_image_folder import make_images

pytestmark = pytest.mark.slow

ARMS: dict[str, Any] = {"static": {"model": {"conv": "static", "conv_args": None}}, "dynamic": {}}
STUDY: dict[str, Any] = {
    "question": "Does the attention matter, or <not>?",
    "base": "small.yaml",
    "arms": ARMS,
    "baseline": "static",
    "seeds": [1, 2],
    "inspect": {"arms": ["dynamic"], "draws": 3},
    "published": {"source": "a paper, table 3", "tag": "second-hand", "values": {"attention": 69.4, "dynamic": 69.9}},
    "differs": ["everything"],
}
ONE_EPOCH = {**SMALL, "trainer": {**SMALL["trainer"], "max_epochs": 1}}


def write_study(folder: Path, **changes: Any) -> None:
    """Write the study; its arms keep their order."""
    write_config(folder, "study.yaml", yaml.safe_dump({**STUDY, **changes}, sort_keys=False))


def ablate(
    folder: Path, *arguments: str, study: str = "study.yaml", timeout: float = 300
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dyn_lightning.ablate", "--config", study, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "ablations" / "study" / "results.json").read_text())


def values(found: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Give all that a cell has measured, but for times."""
    return {(row["arm"], row["seed"]): (row["metrics"], row["conditions"]) for row in found["cells"]}


class AllDigits(Digits):
    """All 1,797 digits to test on, an odd number."""

    def __init__(self, image_size: int = 16, batch_size: int = 64) -> None:
        super().__init__(image_size, batch_size)
        self.test_set = self.train_set.dataset  # type: ignore[attr-defined]


class TestStudy:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("study")
        write_config(folder, config=ONE_EPOCH)
        write_study(folder)
        done = ablate(folder)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "printed").write_text(done.stdout)
        return folder

    def test_says_how_far_it_is(self, folder: Path) -> None:
        lines = (folder / "printed").read_text().splitlines()
        assert lines[0] == "study folder: runs/ablations/study; 0 cells are finished, 4 are to run"
        order = ["static, seed 1", "static, seed 2", "dynamic, seed 1", "dynamic, seed 2"]
        for number, (line, cell) in enumerate(zip(lines[1:5], order, strict=True), 1):
            assert re.fullmatch(rf"{number} of 4: {cell} finished after \d+ s", line)
        assert lines[5] == "report: runs/ablations/study/index.html"

    def test_a_cell_is_what_fit_gives(self, folder: Path) -> None:
        done = fit(folder, "--config", "small.yaml", "--seed_everything", "2", "--name", "alone")
        assert done.returncode == 0, done.stderr[-3000:]
        alone = json.loads((folder / "runs" / "alone" / "version_0" / "run.json").read_text())
        (cell,) = [row for row in results(folder)["cells"] if (row["arm"], row["seed"]) == ("dynamic", 2)]
        assert cell["metrics"] == alone["metrics"]
        assert cell["value"] == alone["metrics"]["test/top1"]

    def test_attention_as_it_is_is_the_test(self, folder: Path) -> None:
        for row in results(folder)["cells"]:
            if row["arm"] == "dynamic":
                assert row["conditions"]["attention"]["top1"] == pytest.approx(row["metrics"]["test/top1"])
                assert row["conditions"]["attention"]["images"] == 360
                assert [len(each["right"]) for each in row["conditions"].values()] == [1, 1, 1, 3, 3]
            else:
                assert row["conditions"] == {}

    def test_differences_are_paired(self, folder: Path) -> None:
        found = results(folder)
        metric = {arm: found["arms"][arm]["metric"]["values"] for arm in ARMS}
        difference = found["arms"]["dynamic"]["difference"]["values"]
        assert difference == {seed: pytest.approx(metric["dynamic"][seed] - metric["static"][seed]) for seed in "12"}
        assert found["arms"]["static"]["difference"] is None

    def test_the_report_has_the_paper_s_numbers_beside_ours(self, folder: Path) -> None:
        out = folder / "runs" / "ablations" / "study"
        text = (out / "report.md").read_text()
        mean = 100 * results(folder)["arms"]["dynamic"]["metric"]["mean"]
        (row,) = [line for line in text.splitlines() if line.startswith("| dynamic ")]
        assert f" {mean:.2f} ± " in row
        assert " 69.9 |" in row
        (row,) = [line for line in text.splitlines() if line.startswith("| attention ")]
        assert " 69.4 |" in row
        assert "second-hand" in text
        assert "differs from the paper: everything" in text

    def test_the_page_needs_nothing_else(self, folder: Path) -> None:
        page = (folder / "runs" / "ablations" / "study" / "index.html").read_text()
        assert "or &lt;not&gt;?" in page
        assert re.findall(r'(?:src|href)="(.{10})', page) == ["data:image"] * 2

    def test_pictures_can_be_opened(self, folder: Path) -> None:
        pictures = list((folder / "runs" / "ablations" / "study").glob("*.png"))
        assert {path.name for path in pictures} == {"1-test_top1.png", "2-dynamic_under_changed_routing.png"}
        for path in pictures:
            with Image.open(path) as image:
                assert min(image.size) > 100

    def test_cells_as_csv(self, folder: Path) -> None:
        with (folder / "runs" / "ablations" / "study" / "cells.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["arm"], row["seed"], row["status"]) for row in rows] == [
            (arm, seed, "finished") for arm in ARMS for seed in "12"
        ]
        assert all(float(row["seconds"]) > 0 for row in rows)

    @pytest.fixture
    def again(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
        """Start it again, in this process, and give what it prints."""
        in_this_process(folder, monkeypatch)

        def start(*arguments: str) -> str:
            main(["--config", "study.yaml", *arguments])
            return capsys.readouterr().out

        return start

    def test_a_second_start_runs_nothing(self, folder: Path, again: Callable[..., str]) -> None:
        before = values(results(folder))
        assert "4 cells are finished, 0 are to run" in again()
        assert values(results(folder)) == before

    def test_the_report_can_be_made_again(self, folder: Path, again: Callable[..., str]) -> None:
        page = folder / "runs" / "ablations" / "study" / "index.html"
        before = page.read_text()
        page.unlink()
        again("--report-only")
        assert page.read_text() == before

    def test_a_changed_study_is_noticed(self, folder: Path, again: Callable[..., str]) -> None:
        """Cells of the changed arm are new; those of before stay, and are left out of the report."""
        arms = {**ARMS, "dynamic": {"model": {"conv_args": {"num_kernels": 2}}}}
        try:
            write_study(folder, arms=arms)
            states = re.findall(r"(\w+) +seed \d +(\w+)", again("--dry-run"))
            assert states == [("static", "finished")] * 2 + [("dynamic", "new")] * 2
            printed = again("--report-only")
            assert re.findall("left aside, of an earlier version of the study: .*/dynamic-seed([12])-", printed) == [
                "1",
                "2",
            ]
            assert "left aside" in (folder / "runs" / "ablations" / "study" / "report.md").read_text()
            assert [row["status"] for row in results(folder)["cells"]] == ["finished"] * 2 + ["unfinished"] * 2
        finally:
            write_study(folder)
        assert "left aside" not in again("--report-only")
        assert [row["status"] for row in results(folder)["cells"]] == ["finished"] * 4


class TestEvaluate:
    """1,797 images in two processes give the counts of one, exactly."""

    def test_two_processes(self, observed_run: Path) -> None:
        folder = observed_run.parents[2]
        arguments = ["--config", str(observed_run / "config.yaml"), "--data.class_path", "tests.test_ablate.AllDigits"]
        found = {}
        for devices in (1, 2):
            output = folder / f"{devices}.json"
            command = [sys.executable, "-m", "dyn_lightning.evaluate", *arguments, "--output", str(output)]
            command += ["--trainer.devices", str(devices), "--trainer.strategy", "ddp" if devices > 1 else "auto"]
            done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr[-3000:]
            found[devices] = json.loads(output.read_text())
            assert "shuffle_across_images" in done.stdout
        one, two = ([{**row, "loss": None} for row in found[devices]["conditions"]] for devices in (1, 2))
        assert one == two
        assert [row["images"] for row in one] == [1797] * 5
        losses = [[row["loss"] for row in found[devices]["conditions"]] for devices in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert found[2]["devices"] == 2


def test_on_imagenet(tmp_path: Path) -> None:
    """A study of the digits trains the network of the paper on a folder of images, at their size; a few of them."""
    make_images(tmp_path / "data" / "imagenet")
    few = {"data": {"init_args": {"batch_size": 3, "num_workers": 0}}, "trainer": {"max_epochs": 1}}
    write_config(tmp_path, "few.yaml", few)
    bases = [str(ROOT / "experiments" / "imagenet" / "dy_mobilenet_v2_x0.5.yaml"), "few.yaml"]
    study = ROOT / "experiments" / "ablations" / "where.yaml"
    arguments = ["--base", json.dumps(bases), "--seeds", "1", "--output", "here"]
    done = ablate(tmp_path, *arguments, study=str(study))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "here" / "results.json").read_text())
    assert [(row["arm"], row["status"]) for row in found["cells"]] == [("static", "finished"), ("dynamic", "finished")]
    static, dynamic = (row["parameters"] for row in found["cells"])
    assert dynamic - static == pytest.approx(3.94e6 - 1.97e6, abs=1e4)  # of the paper's 1,000 classes
    assert [row["images"] for row in found["cells"][1]["conditions"].values()] == [6] * 5  # of the folder val


def test_one_that_is_killed_in_its_test_knows_its_training(tmp_path: Path) -> None:
    found = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "whole":
            (folder / "done").touch()
        kill = {"class_path": "tests.killer.KillInTest", "init_args": {"done": "done"}}
        callbacks = [*SMALL["trainer"]["callbacks"], kill]
        write_config(folder, config={**SMALL, "trainer": {**ONE_EPOCH["trainer"], "callbacks": callbacks}})
        write_study(folder, arms={"dynamic": {}}, baseline=None, seeds=[1], inspect=None, published=None)
        done = ablate(folder)
        assert done.returncode == 0, done.stderr[-3000:]
        (row,) = results(folder)["cells"]
        assert row["starts"] == 1 + (name == "killed")
        found.append(row["metrics"])
    assert {"train/loss", "val/top1", "test/top1"} <= found[0].keys()
    assert found[0] == found[1]


class TestFailures:
    def test_one_cell_fails_and_the_others_go_on(self, tmp_path: Path) -> None:
        write_config(tmp_path, config=ONE_EPOCH)
        broken = {"trainer": {"callbacks": [{"class_path": "tests.killer.FailAt", "init_args": {"step": 3}}]}}
        write_study(tmp_path, arms={"broken": broken, **ARMS}, seeds=[1], inspect=None, published=None)
        done = ablate(tmp_path)
        assert done.returncode == 1
        assert "not finished: broken, seed 1 (see the report)" in done.stderr
        assert [row["status"] for row in results(tmp_path)["cells"]] == ["failed", "finished", "finished"]
        report = (tmp_path / "runs" / "ablations" / "study" / "report.md").read_text()
        assert "## Failed: broken, seed 1" in report
        assert "RuntimeError: on purpose" in report


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Harness or cell is killed five times; the results are those of a study that nobody disturbed."""
    expected = None
    for name, kills in (("whole", 0), ("killed", 5)):
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, config={**SMALL, "trainer": {**SMALL["trainer"], "max_epochs": 8}})
        write_study(folder, seeds=[1])
        moments = random.Random(7)
        for kill in range(kills):
            command = [sys.executable, "-m", "dyn_lightning.ablate", "--config", "study.yaml"]
            harness = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
            if kill % 2:
                saved = checkpoints(folder)
                wait_for(lambda: checkpoints(folder) - saved, seconds=120)  # noqa: B023 - called at once
                time.sleep(moments.uniform(0, 0.5))
                for process in cells_of(folder):
                    os.kill(process, signal.SIGKILL)
                time.sleep(moments.uniform(0, 2))
            else:
                wait_for(lambda: cells_of(folder), seconds=120)  # noqa: B023 - called at once
                time.sleep(moments.uniform(0, 8))
            assert harness.poll() is None
            harness.kill()
            harness.wait()
        done = ablate(folder)
        assert done.returncode == 0, done.stderr[-3000:]
        found = values(results(folder))
        expected = expected or found
        assert found == expected
        starts = list(folder.glob("runs/ablations/study/cells/*/version_0/run*.json"))
        assert len(starts) >= 2 + kills // 2  # that did train: two cells, and again after each kill of one


def checkpoints(folder: Path) -> set[tuple[Path, int]]:
    """Find the checkpoints to go on from, with the times they were written at."""
    found = set()
    for path in folder.rglob("last.ckpt"):
        with contextlib.suppress(OSError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def test_a_cell_of_two_processes_goes_on(tmp_path: Path) -> None:
    """One of them is killed: the other is ended too, and both go on from the checkpoint, with the same result."""
    trainer = {**SMALL["trainer"], "max_epochs": 8, "devices": 2, "strategy": "ddp"}
    found = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_config(folder, config={**SMALL, "trainer": trainer})
        write_study(folder, arms={"dynamic": {}}, baseline=None, seeds=[1])
        command = [sys.executable, "-m", "dyn_lightning.ablate", "--config", "study.yaml"]
        with subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as harness:
            if name == "killed":
                wait_for(lambda: checkpoints(folder), seconds=120)  # noqa: B023 - called at once
                first, second = sorted(cells_of(folder))
                os.kill(first, signal.SIGKILL)
                wait_for(lambda: second not in cells_of(folder), seconds=20)  # noqa: B023
            assert harness.wait(timeout=300) == 0
        (row,) = results(folder)["cells"]
        assert (row["status"], row["devices"], row["starts"]) == ("finished", 2, 1 + (name == "killed"))
        assert row["device_hours"] == pytest.approx(2 * row["seconds"] / 3600, abs=1e-5)
        assert [each["images"] for each in row["conditions"].values()] == [360] * 5
        found.append(values(results(folder)))
    assert found[0] == found[1]


CELLS = tuple(f"{sys.executable}\0-m\0dyn_lightning.{program}\0".encode() for program in ("fit", "evaluate"))


def cells_of(folder: Path) -> list[int]:
    """Find the processes of the cells of a study."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.joinpath("cwd").resolve() == folder and (path / "cmdline").read_bytes().startswith(CELLS):
                found.append(int(path.name))
        except OSError:
            continue
    return found
