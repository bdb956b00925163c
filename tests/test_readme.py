"""What the README says, done."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from dyn_lightning import convert, watch
from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.layers import CONVS
from tests.command_line import ROOT, fit
from tests.kept_runs import NETWORKS, networks

README = (ROOT / "README.md").read_text(encoding="utf8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_ten_lines_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("python")[0], {})
    assert "16 of 20 convolutions replaced" in capsys.readouterr().out


def test_folding() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    kinds = [type(module) for module in names["deployed"].modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d)) == (20, 0)
    assert round(100 * (parameters(names["model"]) / parameters(resnet18()) - 1), 1) == 2.4


def test_methods_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("python")[2], {})
    *table, summary, chosen = capsys.readouterr().out.splitlines()
    assert table[0].split()[-1] == "method"
    assert summary.startswith("51 of 52 convolutions replaced")
    assert next(line.split()[0] for line in table if line.endswith("cpp")) == "features.1.conv.1"
    assert chosen == "mixture"


def test_a_layer_of_your_own() -> None:
    module = types.ModuleType("my_package")
    exec(blocks("python")[3], vars(module))
    model = resnet18()
    convert(model, module.MyConv2d, kernels=5)
    with watch(model) as routing:
        model(torch.randn(2, 3, 32, 32))
    assert len(routing) == 16
    assert all(weights.shape == (2, 5) for weights in routing.values())


def test_the_experiment_on_images_of_your_own(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()).save(
                    folder / f"{number}.png"
                )
    (tmp_path / "exp.yaml").write_text(blocks("yaml")[0])
    small = [
        "--trainer.max_epochs",
        "1",
        "--data.batch_size",
        "4",
        "--data.image_size",
        "64",
        "--data.num_workers",
        "0",
    ]
    done = fit(tmp_path, "--config", "exp.yaml", *small, "--trainer.accelerator", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "runs" / "exp" / "version_0" / "run.json").read_text())
    assert record["steps"] == 2
    assert "val/top1" in record["metrics"]


def test_every_option_that_is_shown_exists(tmp_path: Path) -> None:
    (tmp_path / "exp.yaml").write_text(blocks("yaml")[0])
    shown = re.findall(r"fit --config exp\.yaml(.*?)(?: #|\n)", "\n".join(blocks("console")))
    options = [*" ".join(shown).replace("--ckpt_path last", "").split(), "--last.every_n_train_steps", "500"]
    done = fit(tmp_path, "--config", "exp.yaml", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    config = yaml.safe_load(done.stdout)
    assert (config["model"]["lr"], str(config["trainer"]["devices"])) == (0.05, "2")


@pytest.mark.parametrize("name", CONVS)
def test_the_layer_table(name: str) -> None:
    layer = CONVS[name](64, 64, (3, 3), padding=1, bias=False)
    row = f"| {parameters(layer):,} | {multiply_adds(layer, (64, 56, 56)) / 1e6:.1f} M |"
    (line,) = re.findall(rf"^\| `{name}` .*$", README, re.MULTILINE)
    assert line.endswith(row)


def test_the_speed_table_is_of_kept_runs() -> None:
    kept: dict[tuple[str, str], str] = {}
    for (name, size, measured), result in networks("other", NETWORKS["other"]).items():
        for job, column in ((measured, "milliseconds"), (f"memory of a {measured}", "MiB")):
            values = result[column]
            ratios = " | ".join(f"{values[which] / values['static']:.2f}" for which in ("auto", "timm"))
            kept[f"{name}, {size} px", job] = ratios
    shown = re.findall(r"^\| (.*, (?:32|224) px) \|(.*)\|$", README, re.MULTILINE)
    assert len(shown) == 10
    for network, cells in shown:
        pairs = re.findall(r"[\d.]+ \| [\d.]+", cells)
        jobs = ("training step", "forward", "forward of one", "memory of a training step")
        for job, pair in zip(jobs, pairs, strict=True):
            assert pair == kept[network, job]


def test_the_table_of_layers_is_the_log_s() -> None:
    log = (ROOT / "experiments/LOG.md").read_text()
    rows = re.findall(r"^\| (EPYC|Xeon), (kept|by glibc): (forward.*?) \| ([\d.]+ % \| .*) \|$", README, re.MULTILINE)
    assert len({row[:3] for row in rows}) == len(rows) == 12
    for processor, memory, job, cells in rows:
        whose = "" if processor == "EPYC" else "Intel's, "
        run = "not fitted to" if memory == "kept" else "by glibc, not fitted to"
        assert f"| {whose}K = 4, {run}, {job} | {cells} |" in log


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"\((docs/[^)]+)\)|(experiments/[\w/.]+\.yaml)", README):
        assert (ROOT / "".join(name)).is_file()
    (tree,) = re.findall(r"^```\ndyn_lightning/\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"^    ([\w.]+(?:, [\w.]+)*)", tree, re.MULTILINE):
        for part in name.split(", "):
            assert (ROOT / "dyn_lightning" / part).exists()


def test_the_layer_table_script_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "experiments.layer_table"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "295,432 parameters" in done.stdout


def test_the_study_is_the_one_that_is_there() -> None:
    shown = yaml.safe_load(blocks("yaml")[1])
    there = yaml.safe_load((ROOT / "experiments" / "ablations" / "aggregation.yaml").read_text())
    assert shown["published"].items() <= there["published"].items()
    assert {**shown, "published": None}.items() <= {**there, "published": None}.items()


def test_every_study_has_its_row() -> None:
    text = (ROOT / "experiments" / "ablations" / "README.md").read_text(encoding="utf8")
    rows = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    paths = (ROOT / "experiments" / "ablations").glob("*.yaml")
    assert sorted(rows) == sorted(path.name for path in paths if "question:" in path.read_text())
