import copy
import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import LightningDataModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Subset, TensorDataset

from dyn_lightning.data import Digits
from dyn_lightning.fit import main
from dyn_lightning.layers import CONVS
from dyn_lightning.record import RunFolder
from tests.command_line import ROOT, SMALL, fit, in_this_process, write_config

# A run with all that draws random numbers: shuffling, mixup, CutMix.
RANDOM = ["--model.mixup", "0.2", "--model.cutmix", "1.0"]
MID_EPOCH = ["--last.every_n_train_steps", "7"]


def succeeds(folder: Path, *arguments: str, **environment: str) -> str:
    done = fit(folder, *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def checkpoint(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in metrics(run) if row["train/loss"]]


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"histograms": 0, "scalars": 0}).Reload()


def observed(run: Path) -> dict[str, dict[int, float]]:
    """Give what the observers logged, by tag and step; each step must be there once."""
    board = events(run)
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("routing_")]
    found = {tag: board.Scalars(tag) for tag in tags}
    assert all(len({event.step for event in curve}) == len(curve) for curve in found.values())
    return {tag: {event.step: event.value for event in curve} for tag, curve in found.items()}


class TestQuickstart:
    @pytest.mark.slow
    def test_learns_the_digits(self, tmp_path: Path) -> None:
        printed = succeeds(tmp_path, "--config", str(ROOT / "experiments" / "quickstart.yaml"))
        run = tmp_path / "runs" / "quickstart" / "version_0"
        record = json.loads((run / "run.json").read_text())
        assert record["metrics"]["test/top1"] >= 0.97
        assert os.path.relpath(record["best_checkpoint"], tmp_path) in printed
        assert f"test/top1        {record['metrics']['test/top1']:.4f}" in printed
        assert f"its val/top1     {record['best_score']:.4f}" in printed
        board = events(run)
        assert {"train/loss", "val/top1", "temperature"} <= set(board.Tags()["scalars"])
        assert "routing/backbone.layer1.0.conv1/3" in board.Tags()["histograms"]
        assert {"routing_report/depth", "expert_examples/backbone.layer1.0.conv1"} <= set(board.Tags()["images"])
        assert (run / "projector_config.pbtxt").is_file()
        assert [event.value for event in board.Scalars("temperature")][-1] == 1


class TestRunFolder:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("run")
        succeeds(folder, "--config", str(write_config(folder)), "--trainer.max_epochs", "1", *RANDOM)
        return folder

    def test_holds_config_checkpoints_events_metrics_and_record(self, folder: Path) -> None:
        run = folder / "runs" / "small" / "version_0"
        assert {"config.yaml", "metrics.csv", "run.json", "checkpoints"} <= {path.name for path in run.iterdir()}
        assert list(run.glob("events.out.tfevents.*"))
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best-epoch=0.ckpt"}

    def test_the_record_says_how_the_results_came_to_be(self, folder: Path) -> None:
        record = json.loads((folder / "runs" / "small" / "version_0" / "run.json").read_text())
        model = (16 * 16 // 4) * 9 * 8  # the static stem
        model += (4 * 4) * 9 * 8 * 12 + 3 * 9 * 8 * 12 + 8 * 2 + 2 * 3  # convolution, mixing, attention
        model += (4 * 4) * 9 * 12 * 16 + 3 * 9 * 12 * 16 + 12 * 3 + 3 * 3
        model += 16 * 10 + 3 * 12 + 3 * 16  # classifier, mixing of biases
        assert record["multiply_adds"] == model
        assert record["parameters"] == sum(
            value.numel()
            for name, value in checkpoint(folder / "runs" / "small" / "version_0")["state_dict"].items()
            if not name.endswith("temperature")
        )
        assert record["status"] == "finished"
        assert "dyn_lightning.fit --config" in record["command"]
        assert record["device_hours"] == pytest.approx(record["seconds"] / 3600, abs=1e-6)
        assert record["packages"]["torch"] == torch.__version__
        assert record["peak_memory_bytes"]["host"] > 1e8
        assert record["seed"] == 1

    def test_its_config_makes_the_same_run(self, folder: Path) -> None:
        saved = folder / "runs" / "small" / "version_0" / "config.yaml"
        assert yaml.safe_load(saved.read_text())["model"]["num_classes"] == 10
        succeeds(folder, "--config", str(saved))
        again = folder / "runs" / "small" / "version_1"
        assert losses(again) == losses(folder / "runs" / "small" / "version_0")
        weights, same = checkpoint(again)["state_dict"], checkpoint(saved.parent)["state_dict"]
        assert all(torch.equal(weights[name], same[name]) for name in weights)


class TestResume:
    """Killed as by a power cut, a run goes on to the very bits of a run that was left alone."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("resume")
        succeeds(folder, "--config", str(write_config(folder)), "--name", "whole", *RANDOM)
        return folder

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param([], id="from the last epoch"),
            pytest.param(MID_EPOCH, id="from the middle of an epoch"),
            pytest.param([*MID_EPOCH, "--data.num_workers", "1"], id="with a worker", marks=pytest.mark.slow),
        ],
    )
    def test_equals_a_run_that_was_never_stopped(
        self, folder: Path, options: list[str], request: pytest.FixtureRequest
    ) -> None:
        name = request.node.callspec.id.replace(" ", "-")
        common = ["--config", str(folder / "small.yaml"), "--name", name, *RANDOM, *options]
        kill = ["--trainer.callbacks+=tests.killer.KillAt", "--trainer.callbacks.step", "30"]
        assert fit(folder, *common, *kill).returncode == -9
        with (folder / "runs" / name / "version_0" / "metrics.csv").open("r+") as file:
            file.seek(0, os.SEEK_END)
            file.write("1,2")  # it may be killed while it writes
            file.seek(0)
            before = file.read()
        succeeds(folder, *common, "--ckpt_path", "last")

        resumed, whole = folder / "runs" / name / "version_0", folder / "runs" / "whole" / "version_0"
        ours, theirs = checkpoint(resumed), checkpoint(whole)
        assert ours["global_step"] == theirs["global_step"] == 57
        assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
        assert any(key.endswith("temperature") for key in ours["state_dict"])
        assert str(ours["optimizer_states"]) == str(theirs["optimizer_states"])
        assert losses(resumed) == losses(whole)
        assert (resumed / "metrics-1.csv").read_text() == before
        steps = [event.step for event in events(resumed).Scalars("train/loss")]
        assert steps == list(range(57))
        ours, theirs = observed(resumed), observed(whole)
        assert ours == theirs
        assert {tuple(values) for values in ours.values()} == {(18, 37, 56)}
        assert "routing_entropy/backbone.conv2" in ours
        assert not (folder / "runs" / name / "version_1").exists()
        assert {"config.yaml", "config-1.yaml", "run.json", "run-1.json"} <= {path.name for path in resumed.iterdir()}

    def test_a_path_starts_a_new_run_and_leaves_the_old_one_alone(self, folder: Path) -> None:
        old = folder / "runs" / "whole" / "version_0"
        before = {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()}
        arguments = ["--config", str(folder / "small.yaml"), "--name", "whole", "--trainer.max_epochs", "4", *RANDOM]
        succeeds(folder, *arguments, "--ckpt_path", str(old / "checkpoints" / "last.ckpt"))
        assert checkpoint(folder / "runs" / "whole" / "version_1")["global_step"] == 76
        assert {path: path.read_bytes() for path in sorted(old.rglob("*")) if path.is_file()} == before

    @pytest.mark.slow
    def test_last_is_found_after_the_folder_moved_and_the_option_changed(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "runs" / "whole" / "version_0", tmp_path / "runs" / "whole" / "version_0")
        common = ["--config", str(folder / "small.yaml"), "--name", "whole", *RANDOM, "--ckpt_path", "last"]
        succeeds(tmp_path, *common, *MID_EPOCH, "--trainer.max_epochs", "4")
        succeeds(tmp_path, *common, "--trainer.max_epochs", "5")
        run = RunFolder.newest(tmp_path / "runs", "whole")
        assert torch.load(run.last(), weights_only=True)["global_step"] == 95

    @pytest.mark.slow
    def test_best_and_a_start_that_failed_before_its_first_checkpoint(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "runs" / "whole" / "version_0", tmp_path / "runs" / "whole" / "version_0")
        (tmp_path / "runs" / "whole" / "version_1").mkdir()
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "32"]
        common = ["--config", str(folder / "small.yaml"), "--name", "whole", "--trainer.max_epochs", "4", *RANDOM]
        succeeds(tmp_path, *common, *two, "--ckpt_path", "best")
        record = json.loads((tmp_path / "runs" / "whole" / "version_2" / "run.json").read_text())
        assert "version_0/checkpoints/best-epoch=" in record["resumed_from"]
        assert record["steps"] == 76


class OddDigits(Digits):
    """Digits with 65 validation images: of two processes, the first has a batch of 32 more."""

    def __init__(self, image_size: int = 16, batch_size: int = 64) -> None:
        super().__init__(image_size, batch_size)
        self.val_set = Subset(self.val_set, range(65))


class TestDistributed:
    """Two processes with half the batch each do what one does."""

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("ddp")
        config = copy.deepcopy(SMALL)
        config["trainer"]["callbacks"] += [{"class_path": "RoutingHistogram", "init_args": {"every_n_steps": 5}}]
        config["data"]["class_path"] = "tests.test_fit.OddDigits"
        config["model"]["backbone"] = "tests.nets.Both"  # has groups to follow too
        arguments = ["--config", str(write_config(folder, config=config)), "--trainer.max_epochs", "2"]
        succeeds(folder, *arguments, "--name", "one")
        two = ["--name", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "32"]
        succeeds(folder, *arguments, *two, *MID_EPOCH)
        return folder / "runs"

    def test_the_loss_curves_are_equal(self, runs: Path) -> None:
        one, two = losses(runs / "one" / "version_0"), losses(runs / "two" / "version_0")
        assert len(one) == 38
        assert two == pytest.approx(one, abs=1e-4)

    def test_evaluation_counts_every_image_once(self, runs: Path) -> None:
        one, two = (json.loads((runs / name / "version_0" / "run.json").read_text()) for name in ("one", "two"))
        for name in ("val/top1", "val/top5", "test/top1", "test/top5", "val/loss", "test/loss"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-5)
        assert two["devices"] == 2
        assert two["device_hours"] == pytest.approx(2 * two["seconds"] / 3600, abs=1e-6)

    def test_routing_statistics_cover_all_samples_once(self, runs: Path) -> None:
        one, two = events(runs / "one" / "version_0"), events(runs / "two" / "version_0")
        tags = one.Tags()["histograms"]
        assert two.Tags()["histograms"] == tags
        assert len(tags) == 2 * 3
        for tag in tags:
            for ours, theirs in zip(two.Histograms(tag), one.Histograms(tag), strict=True):
                assert ours.step == theirs.step
                assert ours.histogram_value.num == theirs.histogram_value.num == 64
                assert ours.histogram_value.sum == pytest.approx(theirs.histogram_value.sum, abs=1e-4)

    def test_routing_reports_are_equal(self, runs: Path) -> None:
        one, two = observed(runs / "one" / "version_0"), observed(runs / "two" / "version_0")
        assert one.keys() == two.keys()
        assert one["routing_images"] == {18: 65, 37: 65}
        for tag, values in one.items():
            assert two[tag] == pytest.approx(values, abs=1e-3), tag

    def test_groups_are_followed_once(self, runs: Path) -> None:
        for tag in (
            "groups/backbone.conv3",
            "group_flips/backbone.conv3",
            "groups_connected",
            "gates/backbone.conv3/0",
        ):
            one, two = (events(runs / name / "version_0").Scalars(tag) for name in ("one", "two"))
            assert [event.step for event in two] == [event.step for event in one] == [18, 37]
            assert [event.value for event in two] == pytest.approx([event.value for event in one], abs=1e-4)

    def test_pictures_are_written_once(self, runs: Path) -> None:
        one, two = (EventAccumulator(str(runs / name / "version_0")).Reload() for name in ("one", "two"))
        tags = one.Tags()["images"]
        assert two.Tags()["images"] == tags
        assert {"routing_report/classes", "expert_examples/backbone.conv2", "group_counts"} <= set(tags)
        assert [[event.step for event in two.Images(tag)] for tag in tags] == [[37]] * len(tags)
        assert len(list((runs / "two" / "version_0").glob("*/routing/tensors.tsv"))) == 1

    def test_the_final_weights_are_saved(self, runs: Path) -> None:
        assert checkpoint(runs / "two" / "version_0")["global_step"] == 38

    def test_one_folder_is_made(self, runs: Path) -> None:
        assert [path.name for path in (runs / "two").iterdir()] == ["version_0"]


class Loaders(LightningDataModule):
    """A user's own data, which says nothing of classes and sizes, and has a test split."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 5), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def test_data_of_your_own(tmp_path: Path) -> None:
    config = {"model": SMALL["model"] | {"num_classes": 5}, "data": {"class_path": "tests.test_fit.Loaders"}}
    printed = succeeds(tmp_path, "--config", str(write_config(tmp_path, config=SMALL | config)))
    assert "test/top1" in printed
    record = json.loads((tmp_path / "runs" / "small" / "version_0" / "run.json").read_text())
    assert record["multiply_adds"] is None


class TestHelp:
    def test_help(self, tmp_path: Path) -> None:
        printed = succeeds(tmp_path, "--help")
        assert "--ckpt_path" in printed
        assert "--model.backbone" in printed

    def test_print_config_is_a_config(self, tmp_path: Path) -> None:
        printed = succeeds(tmp_path, "--config", str(write_config(tmp_path)), "--model.lr", "0.25", "--print_config")
        config = yaml.safe_load(printed)
        assert config["model"]["lr"] == 0.25
        assert config["model"]["conv_args"] == {"num_kernels": 3}
        assert not (tmp_path / "runs").exists()

    def test_later_configs_win(self, tmp_path: Path) -> None:
        later = write_config(tmp_path, "later.yaml", {"model": {"lr": 0.125}})
        arguments = ["--config", str(write_config(tmp_path)), "--config", str(later), "--print_config"]
        config = yaml.safe_load(succeeds(tmp_path, *arguments))
        assert (config["model"]["lr"], config["model"]["backbone"]) == (0.125, "tests.nets.Plain")

    def test_fast_dev_run_leaves_nothing(self, tmp_path: Path) -> None:
        succeeds(tmp_path, "--config", str(write_config(tmp_path)), "--trainer.fast_dev_run", "true")
        assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    succeeds(folder, "--config", "small.yaml", "--trainer.max_epochs", "1")
    return folder


@pytest.mark.parametrize("conv", CONVS)
def test_every_layer_by_its_name(
    conv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since the command itself is tested above."""
    in_this_process(tmp_path, monkeypatch)
    model = {"backbone": "cifar_resnet", "backbone_args": {"depth": 8}, "conv": conv, "lr": 0.05}
    trainer = SMALL["trainer"] | {"max_epochs": 2, "callbacks": []}
    if conv == "dynamic":
        trainer["callbacks"] = [{"class_path": "TemperatureAnnealing"}]
    main(["--config", str(write_config(tmp_path, config=SMALL | {"model": model, "trainer": trainer}))])
    assert conv == "static" or " convolutions replaced; parameters in " in capsys.readouterr().out
    run = tmp_path / "runs" / "small" / "version_0"
    falling = losses(run)
    assert len(falling) == 38
    assert sum(falling[-5:]) < 0.93 * sum(falling[:5])  # the static network reaches 0.87
    assert "test/top1" in json.loads((run / "run.json").read_text())["metrics"]
