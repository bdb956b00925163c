"""Charts of curves that belong together."""

import re

from pytorch_lightning import Callback, LightningModule, Trainer

from dyn_lightning.callbacks.notices import say_without_tensorboard
from dyn_lightning.callbacks.pictures import writers
from dyn_lightning.protocols import Annealed, Grouped, Routed, named_layers

Charts = dict[str, list[str]]

TRAINING: Charts = {"loss": ["train/loss", "val/loss"], "accuracy": ["val/top1", "val/top5"]}
# The charts of each protocol's layers, by title; the tags are regular expressions.
CHARTS: dict[type, Charts] = {
    Annealed: {"loss and temperature": ["train/loss", "val/loss", "temperature"]},
    Routed: {
        "entropy / log2 K of all layers": ["routing_entropy/.*"],
        "share of the largest kernel": ["routing_largest/.*"],
        "part of the kernels in use": ["routing_balance/.*"],
        "dead kernels": ["routing_dead/.*"],
        "variance between classes": ["routing_classes/.*"],
    },
    Grouped: {
        "groups of all layers": ["groups/.*"],
        "connected pairs, of all and of the budget": ["groups_connected", "train/complexity"],
        "flips of gates": ["group_flips/.*"],
    },
}


class ScalarLayout(Callback):
    """Tells TensorBoard's page "Custom Scalars" which curves belong in one chart, for the layers that the model has.

    Args:
        charts: more charts: lists of tags, which may be regular expressions, by title.

    Raises:
        ValueError: a tag that is no regular expression.
    """

    def __init__(self, charts: Charts | None = None) -> None:
        for title, tags in (charts or {}).items():
            for tag in tags:
                try:
                    re.compile(tag)
                except re.error as error:
                    raise ValueError(
                        f"charts[{title!r}] has {tag!r}, which is no regular expression: {error}"
                    ) from error
        self.charts = charts or {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout."""
        charts = dict(TRAINING)
        for protocol, more in CHARTS.items():
            charts |= more if dict(named_layers(pl_module, protocol)) else {}
        charts |= self.charts
        say_without_tensorboard(trainer)
        layout = {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
        if trainer.is_global_zero:
            for writer in writers(trainer):
                writer.add_custom_scalars({"dyn_lightning": layout})
