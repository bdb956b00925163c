"""Whatever is wrong ends with exit code 2 and one paragraph before anything runs, and leaves nothing behind."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dyn_lightning.fit import main
from tests.command_line import SMALL, fit, in_this_process, write_config


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(tmp_path, monkeypatch)


def changed(path: str, value: Any) -> dict[str, Any]:
    """Give the small configuration with one key changed; numbers in the path are places in lists."""
    config = copy.deepcopy(SMALL)
    place: Any = config
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[last] = value
    return config


def message(capsys: pytest.CaptureFixture[str], *arguments: str, leaves: tuple[str, ...] = ()) -> str:
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    assert {path.name for path in set(Path().rglob("*")) - before if "tfevents" not in path.name} == set(leaves)
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in printed
    assert printed.endswith(line + "\n")
    return line


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("modle/backbone", "resnet18", "no key 'modle', did you mean 'model'"),
        ("trainer/max_epoch", 3, "no key 'trainer.max_epoch', did you mean 'trainer.max_epochs'"),
        ("model/bakbone", "resnet18", "no key 'model.bakbone', did you mean 'model.backbone'"),
        ("data/init_args/batchsize", 3, "no key 'batchsize', did you mean 'batch_size'"),
        ("trainer/callbacks/0/init_args/epoch", 3, "Annealing: there is no key 'epoch', did you mean 'epochs'"),
        ("data/class_path", "Digit", "no class 'Digit', did you mean 'Digits'"),
        ("trainer/callbacks/0/class_path", "TempAnnealing", "no class 'TempAnnealing', did you mean 'TemperatureAnn"),
        ("model/lr", "fast", "model.lr: 'fast' is no float"),
        ("trainer/max_epochs", "many", "trainer.max_epochs: 'many' is no int"),
        ("data/init_args/batch_size", "x", "data.batch_size: 'x' is no int"),
        ("data/init_args/batch_size", 0, "batch_size=0 must be at least 1"),
        ("model/backbone", "resnet19", "backbone='resnet19' does not exist, did you mean 'resnet1"),
        ("model/backbone", "tests.nets.Plane", "the module 'tests.nets' has no 'Plane'"),
        ("model/backbone_args", {"width": 3}, "unexpected keyword argument 'width'"),
        ("model/conv", "dynamc", r"did you mean 'dynamic'.*'compconv', 'condconv', 'dgconv', 'doconv'"),
        ("model/conv", "tests.nets.MyConv", "conv='tests.nets.MyConv' does not exist"),
        ("model/include", "layer9.*", r"include='layer9\.\*' matches no convolution; there are conv1, conv2, conv3"),
        ("model/exclude", ["conv[23]"], "no convolution would be replaced"),
        ("model/conv_args", {"num_kernels": 0}, "num_kernels=0 must be at least 1"),
        ("model/conv_args", {"kernels": 4}, r"conv2 = .*unexpected keyword argument 'kernels'"),
        ("model/conv_args", {"temperature": -1}, "temperature=-1 must be a finite number above 0"),
        ("model/conv_args", {"method": "fast"}, r"method='fast' does not exist, choose one of \['auto',"),
        ("model/conv_args", {"max_mixed_bytes": 0}, "max_mixed_bytes=0 must be at least 1"),
        ("model/conv_args", {"include": "conv2"}, r"conv_args has \['include'\]: give model.include instead"),
        ("model/group_budget", 32, "group_budget=32.0 needs layers that learn their groups"),
        ("model/conv_args", {"share": "blocks"}, "share='blocks' must be one of"),
        ("model/conv_args", {"share": "model"}, "share and hierarchical need a layer with one router"),
        ("model/num_classes", 7, r"model.num_classes=7, but the data \(Digits\) have num_classes=10"),
        ("model/channels", 3, r"model.channels=3, but the data \(Digits\) have channels=1"),
        ("model/backbone_args", {"num_classes": 7}, r"gives \(2, 7\) for 2 images; .* must give \(2, 10\)"),
        ("model/backbone_args", {"in_channels": 3}, r"'conv1' takes 3 channels, but the images have 1"),
        ("model/optimizer", "SDG", "optimizer='SDG' does not exist"),
        ("model/optimizer_args", {"momentun": 1}, "unexpected keyword argument 'momentun'"),
        ("model/scheduler", "StepLr", "scheduler='StepLr' does not exist"),
        ("model/weights", "nowhere.pt", "weights='nowhere.pt' is no file"),
        ("data", {"class_path": "ImageFolder", "init_args": {"root": "nowhere"}}, "nowhere/train is missing"),
        ("trainer/callbacks/0/init_args/start", 0, "start=0.0 must be a finite number above 0"),
        ("trainer/callbacks/0/init_args/schedule", "cos", "schedule='cos' does not exist"),
        ("trainer/devices", 4096, r"trainer.devices=4096: this machine has \d+ processor cores"),
        ("trainer/accelerator", "abacus", "abacus"),
        ("trainer/precision", 17, "trainer.precision"),
        ("trainer", 3, "trainer: 3 is no mapping of keys"),
        ("model", 3, "model: 3 is no mapping of keys"),
        ("best/monitor", "val/acc", "best.monitor: there is no metric 'val/acc'"),
        ("model/warmup_epochs", -1, "warmup_epochs=-1.0 must be a finite number, 0 or more"),
        ("model/lr", float("nan"), "lr=nan must be a finite number"),
        ("model/conv_args", {"num_kernels": "four"}, "num_kernels='four' must be a whole number"),
        ("model/conv_args", {"num_kernels": 2.5}, "num_kernels=2.5 must be a whole number"),
        ("data/class_path", "nowhere.Data", "data.*nowhere"),
        ("data", {"init_args": {"image_size": 8}}, "data: there is no class_path; there are Digits"),
        ("trainer/logger", {"class_path": "CVSLogger"}, "no class 'CVSLogger', did you mean 'CSVLogger'"),
        ("best/dirpath", "elsewhere", "best.dirpath=elsewhere: checkpoints belong in the run's folder"),
    ],
)
def test_in_the_config(path: str, value: Any, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path(), config=changed(path, value))
    assert re.search(says, message(capsys, "--config", "small.yaml"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trainer.max_epoch", "3"], "no key 'trainer.max_epoch', did you mean 'trainer.max_epochs'"),
        (["--model.l", "3"], "no key 'model.l', did you mean 'model.lr'"),
        (["--nam", "x"], "no key 'nam', did you mean 'name'"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs: 'many' is no int"),
        (["--ckpt_path", "last"], "no run below runs/small has a checkpoint"),
        (["--ckpt_path", "best"], "no run below runs/small has a checkpoint"),
        (["--ckpt_path", "nowhere.ckpt"], "--ckpt_path nowhere.ckpt: there is no such file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_on_the_command_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path())
    assert re.search(says, message(capsys, "--config", "small.yaml", *arguments))


@pytest.mark.parametrize("arguments", [["--trainer.max_epochs=-1"], ["--trainer.limit_train_batches=0"]])
def test_that_only_the_first_step_shows(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The run's folder is there by then; its record says that and why it failed."""
    write_config(Path())
    leaves = ("runs", "small", "version_0", "config.yaml", "run.json")
    said = message(capsys, "--config", "small.yaml", *arguments, leaves=leaves)
    assert "the cosine needs an end, but max_epochs=" in said
    assert "failed: ValueError: the cosine" in Path("runs", "small", "version_0", "run.json").read_text()


@pytest.mark.parametrize("text", ["model: {a: b: c", "just words", "- a\n- list\n"])
def test_config_that_is_no_config(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path(), config=text)
    assert "small.yaml" in message(capsys, "--config", "small.yaml")


def test_data_folder_without_images(capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        Path("images", split, "cat").mkdir(parents=True)
    write_config(Path(), config=changed("data", {"class_path": "ImageFolder", "init_args": {"root": "images"}}))
    assert "images/train must hold a folder of images for each class" in message(capsys, "--config", "small.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    write_config(Path(), config=changed("trainer/accelerator", "gpu"))
    assert "gpu" in message(capsys, "--config", "small.yaml", "--trainer.devices", "2")


class TestCheckpoint:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        done = fit(folder, "--config", str(write_config(folder)), "--trainer.max_epochs", "1")
        assert done.returncode == 0, done.stderr[-2000:]
        return folder

    def test_truncated(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        whole = (folder / "runs" / "small" / "version_0" / "checkpoints" / "last.ckpt").read_bytes()
        Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
        said = message(capsys, "--config", str(folder / "small.yaml"), "--ckpt_path", "half.ckpt")
        assert "half.ckpt is no whole checkpoint" in said

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--model.conv", "condconv", "--model.conv_args", "{}"], r"only in the checkpoint: .*router\.fc1\.weight"),
            (["--model.conv_args.num_kernels", "4"], r"of another shape: backbone\.conv2\.weight \(3, 12, 8, 3, 3\)"),
            (["--model.lr", "0.5"], r"model\.lr=0\.5, but .* was trained with 0\.05"),
            (["--model.optimizer", "Adam"], r"model\.optimizer=Adam, but .* was trained with SGD"),
        ],
    )
    def test_of_another_model_or_optimizer(
        self, folder: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        saved = str(folder / "runs" / "small" / "version_0" / "checkpoints" / "last.ckpt")
        said = message(capsys, "--config", str(folder / "small.yaml"), *arguments, "--ckpt_path", saved)
        assert re.search(says, said)

    def test_a_run_that_has_none_yet(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("runs", "small", "version_3").mkdir(parents=True)
        said = message(capsys, "--config", str(folder / "small.yaml"), "--ckpt_path", "last")
        assert "no run below runs/small has a checkpoint" in said


def test_the_traceback_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LIGHTNING_TRACEBACK", "1")
    write_config(Path(), config=changed("model/conv_args", {"num_kernels": 0}))
    with pytest.raises(ValueError, match="num_kernels=0"):
        main(["--config", "small.yaml"])


def test_from_the_shell(tmp_path: Path) -> None:
    write_config(tmp_path, config=yaml.safe_load(yaml.safe_dump(changed("trainer/max_epoch", 3))))
    done = fit(tmp_path, "--config", "small.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: there is no key 'trainer.max_epoch'")
    assert os.listdir(tmp_path) == ["small.yaml"]
