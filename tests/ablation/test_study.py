import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dyn_lightning.ablate import main
from dyn_lightning.ablation.study import Cell, digest
from tests.command_line import ROOT, SMALL, in_this_process, refused, write_config
from tests.data.test_image_folder import make_images

STUDY: dict[str, Any] = {
    "question": "Does the attention matter?",
    "base": "small.yaml",
    "arms": {"static": {"model": {"conv": "static", "conv_args": None}}, "dynamic": {}},
    "baseline": "static",
    "seeds": [1, 2],
    "inspect": {"arms": ["dynamic"]},
    "published": {"source": "a paper", "tag": "read", "values": {"attention": 69.4}},
}

STUDIES = [
    path for path in sorted((ROOT / "experiments" / "ablations").glob("*.yaml")) if "question:" in path.read_text()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    in_this_process(tmp_path, monkeypatch)
    write_config(tmp_path)
    return tmp_path


def changed(path: str, value: Any) -> dict[str, Any]:
    study = copy.deepcopy(STUDY)
    *parents, last = path.split("/")
    place = study
    for key in parents:
        place = place[key]
    place[last] = value
    return study


class TestBadInput:
    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            ("arms", {}, "study.yaml: arms is empty"),
            ("seeds", [1, 1], r"seeds=[1, 1] must be different numbers"),
            ("seeds", [1, -1], r"seeds=[1, -1] must be from 0 to 4294967295"),
            ("arms/dynamic", {"seed_everything": 5}, "arms.dynamic.seed_everything: each cell has its own"),
            ("base", "none.yaml", "none.yaml"),
            ("baseline", "statics", "study.yaml: baseline: there is no arm 'statics', did you mean 'static'?"),
            ("inspect/arms", ["dyn"], "inspect.arms: there is no arm 'dyn'"),
            ("inspect/draws", 0, "study.yaml: inspect.draws=0 must be at least 1"),
            ("inspect/conditions", [{"mode": "mean"}], "study.yaml: mode='mean' does not exist"),
            ("inspect/split", "train", "study.yaml: inspect.split='train' must be val or test"),
            (
                "inspect/conditions",
                [{"resolutions": [7], "name": "attention"}],
                "dynamic: resolutions=[7] of 'attention'",
            ),
            ("arms/dynamic", {"ckpt_path": "best.ckpt"}, "arms.dynamic.ckpt_path: each cell has its own"),
            ("arms/dynamic", {"trainer": {"fast_dev_run": True}}, "arms.dynamic: trainer.fast_dev_run leaves nothing"),
            ("arms/dynamic", {"best": {"monitor": None}}, "arms.dynamic: inspect needs the best checkpoint"),
            ("seconds", "long", "study.yaml: "),
            ("inspect/arms", ["static"], "study.yaml: arms.static: the model has no layer that routes images"),
            ("published/tag", "memory", "study.yaml: published.tag='memory' must be one of ['read', 'second-hand']"),
            ("published/values", {"attentoin": 1.0}, "no arm or condition 'attentoin', did you mean 'attention'?"),
            ("questoin", "x", "study.yaml: there is no key 'questoin', did you mean 'question'"),
            ("metric", "test/top2", "arms.static: metric: there is no metric 'test/top2'"),
            (
                "arms/dynamic",
                {"model": {"bakbone": "x"}},
                "arms.dynamic: there is no key 'model.bakbone', did you mean",
            ),
            ("arms/dynamic", {"modle": {"lr": 1}}, "arms.dynamic: there is no key 'modle', did you mean 'model'"),
            ("arms/dynamic", {"model": {"conv_args": {"kernels": 2}}}, "study.yaml: arms.dynamic: "),
            ("arms/dynamic", {"trainer": {"max_epochs": "x"}}, "arms.dynamic: trainer.max_epochs: 'x' is no int"),
            ("arms/dynamic", {"data": {"init_args": {"batch_size": 1}}}, "'shuffle_across_images' needs 2 images"),
        ],
        ids=str,
    )
    def test_in_the_study(
        self, path: str, value: Any, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_config(folder, "study.yaml", yaml.safe_dump(changed(path, value), sort_keys=False))
        assert says in refused(capsys, main, "--config", "study.yaml")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--only", "dynamic", "stat"], "--only: there is no arm 'stat', did you mean 'static'?"),
            (["--base", "nowhere.yaml"], "nowhere.yaml"),
            (["--jobs", "0"], "jobs=0 must be at least 1"),
            (["--sedes", "1"], "sedes"),
            (["--report-only"], "--report-only: there is no study in runs/ablations/study"),
            (["--output", "small.yaml"], "exists and holds no study"),
        ],
        ids=str,
    )
    def test_on_the_command_line(
        self, arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_config(folder, "study.yaml", STUDY)
        assert says in refused(capsys, main, "--config", "study.yaml", *arguments)

    def test_no_slurm(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        write_config(folder, "study.yaml", yaml.safe_dump(STUDY, sort_keys=False))
        monkeypatch.setenv("PATH", str(folder))
        said = refused(capsys, main, "--config", "study.yaml", "--launcher", "slurm")
        assert "launcher=slurm: there is no SLURM here (no command sbatch)" in said
        monkeypatch.setitem(sys.modules, "submitit", None)
        said = refused(capsys, main, "--config", "study.yaml", "--launcher", "slurm")
        assert "launcher=slurm needs submitit: pip install" in said

    def test_no_file(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "nowhere.yaml" in refused(capsys, main, "--config", "nowhere.yaml")

    def test_no_name(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        study = json.dumps({**STUDY, "base": str(folder / "small.yaml")})
        assert "--config must be a file" in refused(capsys, main, "--config", study)


def test_a_report_needs_no_device_of_the_cells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(folder, "study.yaml", yaml.safe_dump(STUDY, sort_keys=False))
    write_config(folder, config={**SMALL, "trainer": {"accelerator": "gpu", "devices": 4, "precision": "16-mixed"}})
    assert "arms.static: " in refused(capsys, main, "--config", "study.yaml")
    out = folder / "runs" / "ablations" / "study"
    out.mkdir(parents=True)
    (out / "study.json").write_text(json.dumps({"name": "study"}))
    main(["--config", "study.yaml", "--report-only"])
    assert "0 of 4 finished" in (out / "report.md").read_text()


class TestDryRun:
    def test_names_that_yaml_reads_as_numbers(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arms = {kernels: {"model": {"conv_args": {"num_kernels": kernels}}} for kernels in (2, 4)}
        published = {**STUDY["published"], "values": {4: 69.4}}
        study = {**STUDY, "arms": arms, "baseline": "2", "inspect": None, "published": published}
        write_config(folder, "study.yaml", yaml.safe_dump(study))
        main(["--config", "study.yaml", "--dry-run", "--only", "4"])
        assert "2 of 4 cells to run" in capsys.readouterr().out

    def test_another_base_takes_another_time(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_config(folder, "study.yaml", yaml.safe_dump({**STUDY, "seconds": 30, "machine": "two cores"}))
        write_config(folder, "other.yaml")
        main(["--config", "study.yaml", "--dry-run", "--base", "other.yaml"])
        assert "4 of 4 cells to run, nobody knows how long one takes" in capsys.readouterr().out

    def test_lists_the_cells(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        study = {**STUDY, "seconds": 30, "machine": "two cores"}
        write_config(folder, "study.yaml", yaml.safe_dump(study, sort_keys=False))
        before = set(folder.rglob("*"))
        main(["--config", "study.yaml", "--dry-run", "--seeds", "3", "4", "5", "--only", "dynamic"])
        assert set(folder.rglob("*")) == before
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:4] for line in lines if "seed" in line] == [
            *([["static", "seed", seed, "left"] for seed in "345"]),
            *([["dynamic", "seed", seed, "new"] for seed in "345"]),
        ]
        assert lines[-1] == "3 of 6 cells to run, about 1 min 30 s on two cores"

    def test_base_is_beside_the_study(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "studies").mkdir()
        write_config(folder / "studies", "study.yaml", {**STUDY, "base": "../small.yaml"})
        main(["--config", "studies/study.yaml", "--dry-run"])
        assert "4 of 4 cells to run" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_can_be_run(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", str(path), "--dry-run"])
    assert re.search(r"(\d+) of \1 cells to run, about .* on two x86-64 cores$", capsys.readouterr().out)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Question: ")
    assert f"# Command:  python -m dyn_lightning.ablate --config experiments/ablations/{path.name}" in lines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_can_be_run_on_imagenet(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(folder / "data" / "imagenet")
    (base,) = re.findall(r'^# ImageNet: --base "?(\S+|\[.*\])"?$', path.read_text(), re.MULTILINE)
    bases = [str(ROOT / each) for each in yaml.safe_load(f"[{base}]" if base[0] != "[" else base)]
    main(["--config", str(path), "--base", json.dumps(bases), "--dry-run"])
    assert re.search(r"(\d+) of \1 cells to run, nobody knows how long one takes$", capsys.readouterr().out)


class TestCell:
    def test_its_name_holds_all_that_decides(self) -> None:
        cells = [
            Cell("an arm/1", seed, {"lr": lr, "seed_everything": seed}, {}) for seed in (1, 2) for lr in (0.1, 0.2)
        ]
        assert len({cell.name for cell in cells}) == 4
        assert all(cell.name.startswith(f"an_arm_1-seed{cell.seed}-") for cell in cells)

    def test_digest_goes_by_value(self) -> None:
        config = {"model": {"lr": 0.1, "conv": None}, "seed": 1}
        assert digest(config) == digest(yaml.safe_load(yaml.safe_dump(config)))
        assert digest(config) != digest({**config, "seed": 2})
