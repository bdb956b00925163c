"""What `python -m dyn_lightning.evaluate` refuses; what it counts is tested with the harness."""

from pathlib import Path

import pytest

from dyn_lightning.evaluate import main
from tests.command_line import refused


@pytest.fixture(autouse=True)
def run(copied_run: Path) -> Path:
    return copied_run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "runs"], "--output runs: it exists already, and nothing is overwritten"),
        (["--output", "nowhere/x.json"], "--output nowhere/x.json: there is no folder nowhere"),
        (["--draws", "0"], "draws=0 must be at least 1"),
        (["--split", "train"], "--split train does not exist, choose one of"),
        (["--data.init_args.batch_size", "1"], "'shuffle_across_images' needs 2 images in a batch"),
        (["--conditions", '[{"mode": "mean"}]'], "mode='mean' does not exist"),
        (["--conditions", '[{"layers": ["nothing"]}]'], "layers of 'attention"),
        (["--conditions", '[{"resolutions": [7]}]'], "no router sees such a map"),
    ],
    ids=str,
)
def test_refuses(arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, main, "--config", str(run / "config.yaml"), *arguments)


def test_refuses_a_network_without_routed_layers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    static = ["--model.conv", "static", "--model.conv_args", "null", "--model.group_budget", "null"]
    assert "is of another model" in refused(capsys, main, "--config", str(run / "config.yaml"), *static)


def test_writes_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("inspection.json", "inspection-1.json"):
        main(["--config", str(run / "config.yaml"), "--draws", "1", "--trainer.enable_progress_bar", "false"])
        assert f"written: {run / name}" in capsys.readouterr().out
        assert (run / name).is_file()
