"""Routing weights as points in TensorBoard's projector."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from pytorch_lightning import LightningModule, Trainer

from dyn_lightning.callbacks.batches import class_names
from dyn_lightning.callbacks.notices import say_without_tensorboard
from dyn_lightning.callbacks.pictures import step_of, writers
from dyn_lightning.callbacks.routing_observer import RoutingObserver, Seen
from dyn_lightning.checks import check_count

SPRITE = 8192  # rows and columns of the largest picture that browsers take


class RoutingProjector(RoutingObserver):
    """Writes, at the end of a training, the routing weights of images as points of TensorBoard's projector.

    A point has an image's weights in all layers, or in those that are chosen, its class and a thumbnail. Images with
    weights that are not finite are left out. Without a TensorBoardLogger it writes nothing.

    Args:
        layers: globs over the names of layers whose weights make a point; None takes all.
        max_images: points, at equal distances in the data (see ``RoutingObserver``, also for the memory).
        side: rows and columns of a thumbnail.
        split: the evaluation to watch: ``"val"`` or ``"test"``.

    Raises:
        ValueError: a count below 1, an unknown split, a glob that matches no routed layer, or more thumbnails than
            browsers show.
    """

    def __init__(
        self, layers: list[str] | None = None, max_images: int = 1_000, side: int = 32, split: str = "val"
    ) -> None:
        check_count("side", side)
        check_count("max_images", max_images)
        if math.ceil(math.sqrt(max_images)) * side > SPRITE:
            raise ValueError(
                f"max_images={max_images} with side={side}: the thumbnails must fit into {SPRITE} x {SPRITE} pixels"
            )
        super().__init__(max_images, split, math.inf, side, layers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say once if there is nothing to see, or no projector."""
        super().setup(trainer, pl_module, stage)
        say_without_tensorboard(trainer)

    def wanted(self, trainer: Trainer) -> bool:
        """Say whether there is a TensorBoard."""
        return bool(writers(trainer))

    def finish(self, trainer: Trainer, pl_module: LightningModule, seen: Seen) -> None:
        """Write if it is time."""
        self.pictures.offer(trainer, partial(self._draw, trainer, step_of(trainer), seen))

    def _draw(self, trainer: Trainer, step: int, seen: Seen) -> None:
        points = torch.cat(list(seen.weights.values()), dim=1)
        rows = points.isfinite().all(1).nonzero().flatten()
        if not len(rows):
            return
        labels = None if seen.labels is None else _metadata(seen.labels[rows].tolist(), class_names(trainer))
        images = None if seen.images is None else seen.images[rows].float() / 255
        for writer in writers(trainer):
            writer.add_embedding(points[rows], labels, images, global_step=step, tag=f"{self.prefix}routing")


def _metadata(labels: list[int], names: Sequence[str]) -> list[str]:
    """Name each point; tabs and line ends would break the file."""
    return [" ".join(names[label].split()) if 0 <= label < len(names) else str(label) for label in labels]
