import re
from pathlib import Path

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn

from dyn_lightning.callbacks import GroupTracker, RoutingReport, ScalarLayout
from dyn_lightning.layers import DGConv2d
from tests.callbacks.boards import board, constant, scalars, train
from tests.training import classifier, digits, head, static


def charts(trainer: Trainer) -> dict[str, list[str]]:
    """Give the tags of each chart, as TensorBoard's plug-in reads them."""
    (event,) = board(trainer).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def grouped() -> LightningModule:
    return classifier(head(nn.Conv2d(1, 4, 3), DGConv2d(4, 6, 3, gate_init="dense"), channels=6), group_budget=2)


TITLES = {
    "static": [],
    "routed": [
        "loss and temperature",
        "entropy / log2 K of all layers",
        "share of the largest kernel",
        "part of the kernels in use",
        "dead kernels",
        "variance between classes",
    ],
    "grouped": ["groups of all layers", "connected pairs, of all and of the budget", "flips of gates"],
}


@pytest.mark.parametrize("kind", TITLES)
def test_each_chart_has_curves(kind: str, tmp_path: Path) -> None:
    models = {"static": lambda: classifier(static()), "routed": classifier, "grouped": grouped}
    callbacks: dict[str, list[Callback]] = {
        "static": [],
        "routed": [constant(), RoutingReport()],
        "grouped": [GroupTracker()],
    }
    trainer = train(models[kind](), digits(), tmp_path, *callbacks[kind], ScalarLayout(), limit_val_batches=2)
    found, tags = charts(trainer), list(scalars(trainer))
    assert list(found) == ["loss", "accuracy", *TITLES[kind]]
    for title, patterns in found.items():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in tags), f"{title}: {pattern} matches none of {tags}"


def test_curves_of_all_layers_are_in_one_chart(tmp_path: Path) -> None:
    trainer = train(classifier(), digits(), tmp_path, constant(), RoutingReport(), ScalarLayout(), limit_val_batches=1)
    (pattern,) = charts(trainer)["entropy / log2 K of all layers"]
    shown = [tag for tag in scalars(trainer) if re.match(pattern, tag)]
    assert sorted(shown) == ["routing_entropy/backbone.0", "routing_entropy/backbone.2"]


def test_charts_of_your_own(tmp_path: Path) -> None:
    layout = ScalarLayout({"rate": ["train/lr"], "loss": ["train/loss"]})
    trainer = train(classifier(static()), digits(), tmp_path, layout, limit_val_batches=0)
    assert charts(trainer) == {
        "loss": ["^train/loss$"],
        "accuracy": ["^val/top1$", "^val/top5$"],
        "rate": ["^train/lr$"],
    }


def test_refuses_what_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"charts\['mine'\] has '\[a', which is no regular expression"):
        ScalarLayout({"mine": ["[a"]})
