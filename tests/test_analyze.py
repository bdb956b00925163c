"""What a checkpoint's layers learned, without training: ``python -m dyn_lightning.analyze``."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dyn_lightning.analyze import main
from dyn_lightning.callbacks import group_tracker
from dyn_lightning.data import Digits
from dyn_lightning.fit import main as train
from tests.command_line import ROOT, SMALL, refused, write_config
from tests.test_bad_input import changed

ROUTED = ("backbone.conv2", "backbone.conv4")
PICTURES = {
    "expert_examples-backbone.conv2.png",
    "expert_examples-backbone.conv4.png",
    "group_counts.png",
    "group_membership-backbone.conv3.png",
    "routing_report-classes.png",
    "routing_report-depth.png",
    "routing_report-similarity.png",
}


@pytest.fixture(autouse=True)
def run(copied_run: Path) -> Path:
    return copied_run


def analyze(run: Path, *arguments: str) -> None:
    main(["--config", str(run / "config.yaml"), *arguments])


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "layers.csv").open(newline="") as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


def logged(run: Path, epoch: int) -> dict[str, float]:
    """Give what the training logged of an evaluation."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[f"routing_entropy/{ROUTED[0]}"]]
    return {name: float(value) for name, value in rows[epoch].items() if value}


def expected_groups(run: Path, epoch: int) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        return float(
            [row for row in csv.DictReader(file) if row["groups/backbone.conv3"]][epoch]["groups/backbone.conv3"]
        )


class Links(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


class TestWritten:
    def test_pictures_table_page_and_record(self, run: Path) -> None:
        analyze(run)
        folder = run / "analysis"
        assert {path.name for path in folder.iterdir()} == PICTURES | {"layers.csv", "index.html", "run.json"}
        for name in PICTURES:
            with Image.open(folder / name) as image:
                assert min(image.size) > 200
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"], record["split"]) == ("finished", "val")
        assert record["metrics"]["routing_images"] == 180

    @pytest.mark.parametrize("which", ["best", "last"])
    def test_the_table_has_what_the_training_logged(self, which: str, run: Path) -> None:
        analyze(run, "--ckpt_path", which)
        epoch = (
            int(re.findall(r"best-epoch=(\d)", str([*(run / "checkpoints").iterdir()]))[0]) if which == "best" else 1
        )
        expected, rows = logged(run, epoch), table(run / "analysis")
        assert list(rows) == [*ROUTED, "backbone.conv3"]
        assert rows["backbone.conv3"]["groups"] == str(expected_groups(run, epoch))
        for layer in ROUTED:
            for name in ("routing_entropy", "routing_balance", "routing_classes", "routing_dead"):
                assert float(rows[layer][name]) == pytest.approx(expected[f"{name}/{layer}"], abs=1e-5)

    def test_of_the_test_images(self, run: Path) -> None:
        analyze(run, "--split", "test")
        record = json.loads((run / "analysis" / "run.json").read_text())
        assert record["metrics"]["routing_images"] == 360
        assert record["metrics"]["test/top1"] == pytest.approx(
            json.loads((run / "run.json").read_text())["metrics"]["test/top1"]
        )

    def test_the_page_needs_nothing_else(self, run: Path) -> None:
        analyze(run)
        page = Links((run / "analysis" / "index.html").read_text())
        assert len(page.sources) == len(PICTURES)
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        text = " ".join(page.words)
        assert {"backbone.conv2", "backbone.conv3", "backbone.conv4", "val/top1"} <= set(text.split())
        assert "From input to output." in text

    def test_group_counts_show_the_training(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: dict[str, Any] = {}
        monkeypatch.setattr(group_tracker, "log_figure", lambda trainer, tag, draw, step: drawn.update({tag: draw()}))
        analyze(run, "--ckpt_path", "last")
        over_time = drawn["group_counts"].axes[0]
        assert over_time.get_title() == "Groups over training"
        assert over_time.collections[0].get_array().shape == (1, 3)  # the start and two epochs

    def test_observers_of_the_configuration_are_used(self, run: Path) -> None:
        config = changed("model/backbone", "tests.nets.Both")
        config["trainer"]["callbacks"] = [
            {"class_path": "ExpertExamples", "init_args": {"layers": ["*conv4"]}},
            {"class_path": "RoutingReport", "init_args": {"max_images": 10}},
        ]
        main(["--config", str(write_config(Path(), config=config)), "--name", "both", "--observe", "false"])
        assert not (run / "analysis" / "expert_examples-backbone.conv2.png").exists()
        assert (run / "analysis" / "expert_examples-backbone.conv4.png").exists()
        assert json.loads((run / "analysis" / "run.json").read_text())["metrics"]["routing_images"] == 10


class TestWeightsAlone:
    """Checkpoints that were saved without callbacks and optimizers."""

    @pytest.mark.parametrize("which", ["best", "last"])
    def test_are_analysed(self, which: str, run: Path) -> None:
        for path in (run / "checkpoints").iterdir():
            saved = torch.load(path, weights_only=True)
            torch.save({name: saved[name] for name in ("state_dict", "epoch", "global_step")}, path)
        analyze(run, "--ckpt_path", which)
        assert {path.name for path in (run / "analysis").glob("*.png")} == PICTURES

    def test_which_is_the_best_must_be_known(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        last = run / "checkpoints" / "last.ckpt"
        torch.save({"state_dict": {}, "global_step": 0}, last)
        shutil.copy(last, run / "checkpoints" / "best-other.ckpt")
        message = refused(capsys, main, "--config", str(run / "config.yaml"))
        assert "--ckpt_path best:" in message
        assert "has no best checkpoint" in message


def test_a_configuration_that_tries_the_training_alone(run: Path) -> None:
    analyze(run, "--trainer.fast_dev_run", "true")
    assert json.loads((run / "analysis" / "run.json").read_text())["metrics"]["routing_images"] == 180
    assert (run / "analysis" / "index.html").is_file()


class TestSplit:
    """Observers of the validation and of the test, in one configuration."""

    @pytest.mark.parametrize(("split", "images"), [("val", 20), ("test", 30)])
    def test_those_of_the_split_are_used(self, split: str, images: int, run: Path) -> None:
        config = changed("model/backbone", "tests.nets.Both")
        config["trainer"]["callbacks"] = [
            {"class_path": "RoutingReport", "init_args": {"max_images": 20}},
            {"class_path": "RoutingReport", "init_args": {"max_images": 30, "split": "test"}},
            {"class_path": "ExpertExamples", "init_args": {"split": "test"}},
        ]
        path = str(write_config(Path(), config=config))
        main(["--config", path, "--name", "both", "--split", split])
        assert json.loads((run / "analysis" / "run.json").read_text())["metrics"]["routing_images"] == images
        assert {path.name for path in (run / "analysis").glob("*.png")} == PICTURES


class TestWhere:
    def test_nothing_is_overwritten(self, run: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        for folder in ("analysis", "analysis-1"):
            analyze(run)
            assert (run / folder / "index.html").is_file()
        assert {path: path.stat().st_mtime_ns for path in before} == before

    def test_a_folder_of_your_choice(self, run: Path) -> None:
        analyze(run, "--output", "a/b")
        assert Path("a/b/index.html").is_file()
        assert not (run / "analysis").exists()

    def test_the_run_that_the_configuration_lies_in(self, run: Path) -> None:
        """Not a newer one of the same name."""
        newer = run.with_name("version_1")
        shutil.copytree(run, newer)
        analyze(run)
        assert (run / "analysis").is_dir()
        assert not (newer / "analysis").exists()

    def test_a_checkpoint_elsewhere(self, run: Path) -> None:
        shutil.copy(run / "checkpoints" / "last.ckpt", "mine.ckpt")
        analyze(run, "--ckpt_path", "mine.ckpt")
        assert Path("analysis/index.html").is_file()


class NoTest(Digits):
    def __init__(self) -> None:
        super().__init__(image_size=16)
        self.test_set = None


def test_two_processes_do_what_one_does(run: Path) -> None:
    analyze(run)
    options = ["--output", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "32"]
    command = [sys.executable, "-m", "dyn_lightning.analyze", "--config", str(run / "config.yaml"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = table(run / "analysis"), table(Path("two"))
    assert one.keys() == two.keys()
    for layer, row in one.items():
        for name, value in row.items():
            if name != "layer" and value:
                assert float(two[layer][name]) == pytest.approx(float(value), abs=1e-5)
    assert json.loads(Path("two/run.json").read_text())["metrics"]["routing_images"] == 180


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--split", "train"], "--split train does not exist, choose one of val, test"),
            (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt: there is no such file"),
            (["--output", "runs"], "--output runs: it exists already, and nothing is overwritten"),
            (["--model.conv_args", "{num_kernels: 5}"], "is of another model"),
            (["--model.conv", "static"], "is of another model"),
            (["--trainer.limit_val_batches", "0"], "trainer.limit_val_batches=0 leaves nothing to look at: give --tr"),
            (["--splt", "val"], "there is no key 'splt', did you mean 'split'"),
        ],
        ids=str,
    )
    def test_one_paragraph_and_nothing_left(
        self, arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert says in refused(capsys, main, "--config", str(run / "config.yaml"), *arguments)

    def test_no_run_of_this_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        config = str(write_config(Path(), "other.yaml"))
        assert "no run below runs/other has a checkpoint" in refused(capsys, main, "--config", config)

    def test_no_test_split(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--config", str(run / "config.yaml"), "--data", "tests.test_analyze.NoTest", "--split", "test"]
        assert "--split test: the data (NoTest) have none, choose val" in refused(capsys, main, *arguments)

    def test_nothing_to_show(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = {**SMALL, "model": {**SMALL["model"], "conv": "static"}}
        config["trainer"] = {**SMALL["trainer"], "max_epochs": 1, "callbacks": []}
        path = str(write_config(tmp_path, "plain.yaml", config))
        train(["--config", path, "--trainer.limit_train_batches", "1"])
        capsys.readouterr()
        assert "there is nothing to show: the model has no layer that routes images" in refused(
            capsys, main, "--config", path
        )
