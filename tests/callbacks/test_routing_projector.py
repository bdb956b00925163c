import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from dyn_lightning.callbacks import RoutingProjector
from tests.callbacks.boards import train
from tests.callbacks.coded import data, routed, softmax_rows
from tests.training import warns_once


def written(trainer: Trainer) -> Path:
    """Give the folder that holds the points, as the projector's own configuration names it."""
    folder = Path(trainer.loggers[0].log_dir)
    paths = [
        line.partition('"')[2].rstrip('"')
        for line in (folder / "projector_config.pbtxt").read_text().splitlines()
        if "tensor_path" in line
    ]
    assert len(paths) == 1
    return (folder / paths[0]).parent


def sprite(folder: Path) -> np.ndarray:
    with Image.open(folder / "sprite.png") as image:
        return np.asarray(image)


def test_points_are_the_weights_of_all_layers(tmp_path: Path) -> None:
    weights = [softmax_rows(7, 3), softmax_rows(7, 2)]
    rows = data(*weights, class_names=("ant", "bee", "big\tcow", "doe"))
    folder = written(train(routed(3, 2), rows, tmp_path, RoutingProjector(), max_epochs=2))
    assert folder.parent.name == "00007"
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), torch.cat(weights, 1).numpy(), atol=1e-6)
    assert (folder / "metadata.tsv").read_text().splitlines() == [
        "ant",
        "bee",
        "big cow",
        "doe",
        "ant",
        "bee",
        "big cow",
    ]
    assert sprite(folder).shape == (24, 24, 3)  # 3 x 3 thumbnails of 8 x 8


def test_of_some_layers_and_images(tmp_path: Path) -> None:
    weights = [softmax_rows(12, 3), softmax_rows(12, 2)]
    projector = RoutingProjector(layers=["*.1"], max_images=4, side=4)
    folder = written(train(routed(3, 2), data(*weights), tmp_path, projector))
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), weights[1][::3].numpy(), atol=1e-6)
    assert (folder / "metadata.tsv").read_text().split() == ["0", "3", "2", "1"]
    assert sprite(folder).shape == (8, 8, 3)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    rows = data(softmax_rows(4, 3))
    images, labels = rows.val_set.tensors  # type: ignore[attr-defined]
    rows.val_set.tensors = (images[:, :, :4], labels)  # type: ignore[attr-defined]
    folder = written(train(routed(3), rows, tmp_path, RoutingProjector()))
    assert sprite(folder).shape == (16, 16, 3)
    assert (sprite(folder)[4:8] == 255).all()
    assert (sprite(folder)[:4] < 255).any()


def test_weights_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    weights = softmax_rows(5, 3)
    weights[1, 2] = math.nan
    folder = written(train(routed(3), data(weights), tmp_path, RoutingProjector()))
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), weights[[0, 2, 3, 4]].numpy(), atol=1e-6)
    assert (folder / "metadata.tsv").read_text().split() == ["0", "2", "3", "0"]


def test_without_tensorboard_it_says_so(tmp_path: Path) -> None:
    with warns_once("no pictures are drawn, since no logger takes them (there is CSVLogger)"):
        train(routed(3), data(softmax_rows(5, 3)), tmp_path, RoutingProjector(), logger=CSVLogger(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_images": 0}, "max_images=0 must be at least 1"),
        ({"side": 0}, "side=0 must be at least 1"),
        ({"max_images": 70_000}, "max_images=70000 with side=32: the thumbnails must fit into 8192 x 8192 pixels"),
    ],
    ids=str,
)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingProjector(**wrong)
