"""What the observers of evaluation share: each image's routing weights once, over all ranks, in bounded memory."""

import math
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from dyn_lightning.analysis.images import squared, thumbnails
from dyn_lightning.callbacks.batches import (
    batch_size,
    images_and_labels,
    loader_length,
    normalization,
    not_repeated,
)
from dyn_lightning.callbacks.notices import say_once, say_without_pictures, say_without_routed_layers
from dyn_lightning.callbacks.pictures import Pictures
from dyn_lightning.checks import check_count, check_globs, matches
from dyn_lightning.routing import named_routers, watch

SPLITS = ("val", "test")
MERGED = 64  # batches whose small tensors are put together, so that small batches take no more than large ones


class Seen(NamedTuple):
    """What was seen of the images of an evaluation; N images.

    Attributes:
        weights: routing weights ``(N, K)`` by layer, float32, on the CPU.
        labels: ``(N,)``, whole numbers, negative where one is not known, or None where the data have none.
        images: ``(N, 3, side, side)``, bytes, filled up with white, or None where nobody wants them or there are none.
    """

    weights: dict[str, Tensor]
    labels: Tensor | None
    images: Tensor | None


class RoutingObserver(Callback, ABC):
    """Collects the routing weights of an evaluation, and hands them to ``finish`` at its end.

    Of more than ``max_images`` images, some at equal distances are taken: data that are sorted by class give images of
    every class. What is kept of an evaluation takes ``max_images (4 sum of K + 8)`` bytes, and with thumbnails
    ``3 max_images side ** 2`` more, on all ranks together, for moments twice; at the end each rank has all of it, and
    pictures that wait for their time hold the last evaluation.

    An image that a sampler gives twice to make ranks equal is counted once. Of several loaders, the first is taken. A
    compiled model runs uncompiled while it is watched. Layers that do not give a row of routing weights for each image
    of the batch are left out, with a warning.

    Args:
        max_images: how many at most, on all ranks together.
        split: ``"val"`` or ``"test"``: the evaluation to watch.
        every_n_evaluations: how often ``pictures`` draws (see ``Pictures``).
        side: rows and columns of the thumbnails that are kept; 0 keeps none.
        layers: globs over the names of the layers to watch; None watches all.

    Attributes:
        pictures: takes what ``finish`` wants to draw.
        prefix: of all tags, since both splits may be watched.

    Raises:
        ValueError: a count below 1, an unknown split, or, when a trainer starts, a glob that matches no routed layer.
    """

    def __init__(
        self,
        max_images: int,
        split: str,
        every_n_evaluations: float | None,
        side: int = 0,
        layers: list[str] | None = None,
    ) -> None:
        check_count("max_images", max_images)
        if every_n_evaluations is not None and every_n_evaluations != math.inf:
            check_count("every_n_evaluations", every_n_evaluations)
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {list(SPLITS)}")
        self.max_images = max_images
        self.split = split
        self.layers = layers
        self.pictures = Pictures(every_n_evaluations)
        self.prefix = "" if split == "val" else f"{split}_"
        self._side = side
        self._watching = ExitStack()
        self._told: set[str] = set()
        self._begin(1, math.inf)

    @abstractmethod
    def wanted(self, trainer: Trainer) -> bool:
        """Say whether a logger takes what ``finish`` makes; the same on every rank."""

    @abstractmethod
    def finish(self, trainer: Trainer, pl_module: LightningModule, seen: Seen) -> None:
        """Make something of what was seen; called on every rank, with the same."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say once if there is nothing to see."""
        if stage not in (("fit", "validate") if self.split == "val" else ("test",)):
            return
        say_without_routed_layers(trainer, pl_module)
        say_without_pictures(trainer)
        names = list(named_routers(pl_module))
        if names:
            check_globs("layers", self.layers or [], names, "routed layer")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.pictures.begin()
        self._told.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if there will be no evaluation."""
        if self.split == "val" and not trainer.enable_validation:
            say_once(trainer, "nothing is shown of the routing after epochs, since the training has no validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last evaluation."""
        self.pictures.end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        if self.split == "val":
            self._begin(trainer.world_size, loader_length(trainer.val_dataloaders, trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        if self.split == "test":
            self._begin(trainer.world_size, loader_length(trainer.test_dataloaders, trainer.num_test_batches))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the routers."""
        self._watch(trainer, pl_module, "val", dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the routers."""
        self._watch(trainer, pl_module, "test", dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what was seen."""
        self._keep(trainer, batch, trainer.val_dataloaders)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what was seen."""
        self._keep(trainer, batch, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what all ranks have seen."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what all ranks have seen."""
        self._end(trainer, pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away, and draw what was seen before."""
        self._stop()
        self.pictures.end()

    def _begin(self, world_size: int, length: float) -> None:
        """Start anew; ``length`` is how many images this rank will see at most."""
        self._most = max(1, self.max_images // world_size)
        self._every = max(1, math.ceil(length / self._most)) if math.isfinite(length) else 1
        self._passed = 0  # images so far
        self._kept: list[Seen] = []
        self._weights: dict[str, Tensor] | None = None  # of the latest batch, while the routers are watched

    def _watch(self, trainer: Trainer, pl_module: LightningModule, split: str, dataloader_idx: int) -> None:
        due = split == self.split and dataloader_idx == 0 and not trainer.sanity_checking
        if not due or not self.wanted(trainer) or self._passed >= self._most * self._every:
            self._stop()
        elif self._weights is None:
            self._weights = self._watching.enter_context(watch(pl_module))
        else:
            self._weights.clear()

    def _stop(self) -> None:
        self._watching.close()
        self._weights = None

    def _keep(self, trainer: Trainer, batch: Any, loaders: Any) -> None:
        if not self._weights:
            return
        size = batch_size(batch, self._weights)
        places = torch.arange(self._passed, self._passed + size)
        self._passed += size
        chosen = (places % self._every == 0) & (places < self._most * self._every) & not_repeated(loaders, places)
        if not chosen.any():
            return
        rows, rows_of = chosen.nonzero().flatten(), {}
        globs = ["*"] if self.layers is None else self.layers
        wanted = {name: weights for name, weights in self._weights.items() if matches(name, globs)}
        for device in {weights.device for weights in wanted.values()}:
            rows_of[device] = rows.to(device)
        weights = {name: w[rows_of[w.device]].float() for name, w in wanted.items() if len(w) == size}
        self._tell_left_out(wanted.keys() - weights.keys())
        images, labels = images_and_labels(batch, size)
        if images is not None and self._side:
            kept = images[rows.to(images.device)]
            images = squared(thumbnails(kept, self._side, *normalization(trainer, images.shape[1])))
        else:
            images = None
        self._kept.append(Seen(weights, None if labels is None else labels[rows.to(labels.device)], images))
        if len(self._kept) > MERGED:
            self._kept = [_joined(self._kept)]

    def _end(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if split != self.split or trainer.sanity_checking:
            return
        self._stop()
        parts = [_on_cpu(_joined(self._kept))] if self._kept else []
        self._kept = []
        if trainer.world_size > 1:
            everywhere: list[list[Seen]] = [[]] * trainer.world_size
            torch.distributed.all_gather_object(everywhere, parts)
            parts = [part for of_rank in everywhere for part in of_rank]
        if parts and (seen := _joined(parts)).weights:
            self.finish(trainer, pl_module, seen)

    def _tell_left_out(self, layers: set[str]) -> None:
        new = sorted(layers - self._told)
        self._told.update(new)
        if new:
            rank_zero_warn(
                f"{type(self).__name__} leaves out {', '.join(new)}: routing weights with other than a row an image"
            )


def _on_cpu(seen: Seen) -> Seen:
    weights = {name: weights.cpu() for name, weights in seen.weights.items()}
    return seen._replace(weights=weights, labels=None if seen.labels is None else seen.labels.cpu())


def _joined(parts: list[Seen]) -> Seen:
    """Put together what several batches or ranks have seen; layers that one of them lacks are left out."""
    names = [name for name in parts[0].weights if all(name in part.weights for part in parts)]
    weights = {name: torch.cat([part.weights[name] for part in parts]) for name in names}
    labels = [part.labels for part in parts if part.labels is not None]
    images = [part.images for part in parts if part.images is not None]
    side = max((part.shape[-1] for part in images), default=0)  # a batch may have larger images than another
    return Seen(
        weights,
        torch.cat(labels) if len(labels) == len(parts) else None,
        torch.cat([squared(part, side) for part in images]) if images and len(images) == len(parts) else None,
    )
