"""Evaluates one network under changed routing weights: how much of its accuracy comes from its attention?

The comparison of Dynamic Convolution's paper (arXiv 1912.03458): its learned attention against the average of the
kernels, the largest kernel alone, and attention that is shuffled over the kernels or over the images.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from dyn_lightning.checks import check_count, check_globs, matches
from dyn_lightning.cost import empty_images, evaluating
from dyn_lightning.data.module import derive_seed
from dyn_lightning.routing import AGGREGATIONS, check_mode, named_routers, replaced

ACROSS_IMAGES = "shuffle_across_images"
SHUFFLES = ("shuffle_per_image", ACROSS_IMAGES)


@dataclass
class Condition:
    """What routing weights become in one evaluation.

    Args:
        mode: a name in ``routing.AGGREGATIONS``.
        layers: globs over the names of the layers that it is for; None is all.
        resolutions: rows of the feature map that the router of such a layer sees; None is all.
        elsewhere: the mode of the other layers.
        name: in the report; made from the rest if it is empty.

    Raises:
        ValueError: a mode that does not exist, or a resolution below 1.
    """

    mode: str = "attention"
    layers: list[str] | None = None
    resolutions: list[int] | None = None
    elsewhere: str = "average"
    name: str = ""

    def __post_init__(self) -> None:
        check_mode(self.mode)
        check_mode(self.elsewhere)
        for rows in self.resolutions or []:
            check_count("resolutions", rows)
        if not self.name:
            where = [", ".join(map(str, places)) for places in (self.layers, self.resolutions) if places is not None]
            self.name = f"{self.mode} at {' of '.join(where)}, {self.elsewhere} elsewhere" if where else self.mode

    @property
    def shuffles(self) -> bool:
        """Whether the result depends on a draw."""
        return bool(self._modes & set(SHUFFLES))

    @property
    def across_images(self) -> bool:
        """Whether it needs two images in a batch."""
        return ACROSS_IMAGES in self._modes

    @property
    def _modes(self) -> set[str]:
        everywhere = self.layers is None and self.resolutions is None
        return {self.mode} if everywhere else {self.mode, self.elsewhere}

    def mode_of(self, names: Sequence[str], rows: int | None) -> str:
        """Say what a router's weights become.

        Args:
            names: of the layers that use it.
            rows: of its feature map; None if it sees none.
        """
        named = self.layers is None or any(matches(name, self.layers) for name in names)
        return self.mode if named and (self.resolutions is None or rows in self.resolutions) else self.elsewhere


ALL_MODES = tuple(Condition(mode) for mode in AGGREGATIONS)


class Inspection(LightningModule):
    """Counts, as a Trainer tests it, how many images a network classifies rightly under each condition.

    Use it inside ``routing.replaced(model, inspection.change)``, with the batches of ``WholeBatches``.

    A shuffle depends on the seed, the draw, the layer and, ``shuffle_per_image``, on the image alone: it is the same
    for any number of ranks and any size of the batches. ``shuffle_across_images`` takes, by its definition, the routing
    weights of another image of the batch, so it also depends on which images are in a batch, and thereby on its size.
    The weights of an image are those of a network whose earlier layers were changed already.

    Args:
        model: gives logits for images ``(B, C, H, W)``.
        conditions: what is compared.
        draws: of each condition that shuffles.
        seed: of the draws.

    Attributes:
        counts: ``(conditions and draws, 3)``: right, right among the first five, images; over all ranks at the end.
        losses: sums of cross-entropies, likewise.

    Raises:
        ValueError: no condition, a count below 1, two conditions of one name, a glob that matches no routed layer, or a
            model without routed layers.
    """

    def __init__(self, model: nn.Module, conditions: Sequence[Condition], draws: int = 5, seed: int = 0) -> None:
        super().__init__()
        check_count("draws", draws)
        if not conditions:
            raise ValueError("conditions is empty: there is nothing to compare")
        names = [condition.name for condition in conditions]
        if len(set(names)) < len(names):
            raise ValueError(f"conditions must have different names, these are {', '.join(names)}")
        self.users: dict[int, list[str]] = {}  # of each router
        self.routers: dict[str, int] = {}  # by the layer that stands for it
        for name, router in named_routers(model).items():
            self.users.setdefault(id(router), []).append(name)
            self.routers.setdefault(name, id(router))
        if not self.users:
            raise ValueError(
                f"the model has no layer that routes images (routers()), which {names[0]!r} needs: train one with "
                "model.conv: dynamic or condconv"
            )
        for condition in conditions:
            check_globs(f"layers of {condition.name!r}", condition.layers or [], list(self.routers), "routed layer")
        self.model = model
        self.conditions = list(conditions)
        self.seed = seed
        self.runs = [
            (condition, draw) for condition in conditions for draw in range(draws if condition.shuffles else 1)
        ]
        self.counts = torch.zeros(len(self.runs), 3, dtype=torch.long)
        self.losses = torch.zeros(len(self.runs), dtype=torch.double)
        self._current = self.runs[0]
        self._images: Tensor = torch.arange(0)

    def change(self, layer: str, x: Tensor | None, weights: Tensor) -> Tensor:
        """Give what routing weights become now (see ``routing.replaced``)."""
        condition, draw = self._current
        rows = x.shape[2] if x is not None and x.dim() == 4 else None
        users = self.users[self.routers[layer]]
        seed = derive_seed(self.seed, draw, list(self.users).index(self.routers[layer]))

        def random(shape: Sequence[int]) -> Tensor:
            places = self._images.view(-1, 1) * shape[1] + torch.arange(shape[1]) if len(shape) == 2 else self._images
            return uniform(seed, places)

        return AGGREGATIONS[condition.mode_of(users, rows)](weights, random)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch under each condition."""
        images, labels = batch
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._images = data.places(batch_idx)
        for place, run in enumerate(self.runs):
            self._current = run
            logits = self.model(images)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            right = torch.stack([best[:, 0].sum(), best.sum(), best.new_tensor(len(best), dtype=torch.long)])
            self.counts[place] += right.cpu()
            self.losses[place] += F.cross_entropy(logits, labels, reduction="sum").cpu().double()

    def on_test_epoch_end(self) -> None:
        """Add up what all ranks have counted."""
        if self.trainer.world_size == 1:
            return
        device = self.trainer.strategy.root_device
        self.counts = self.trainer.strategy.reduce(self.counts.to(device), reduce_op="sum").cpu()
        self.losses = self.trainer.strategy.reduce(self.losses.to(device), reduce_op="sum").cpu()

    def results(self) -> list[dict[str, Any]]:
        """Give a row a condition: its name and mode, the accuracy of each draw, and their mean and deviation.

        ``top1`` and ``top5`` are parts of the images, ``loss`` is the mean over the images, all over the draws;
        ``top1_deviation`` is the standard deviation of the draws, None where there is one.
        """
        rows = []
        found = zip(self.runs, self.counts.tolist(), self.losses.tolist(), strict=True)
        for _, group in itertools.groupby(found, lambda each: each[0][0].name):
            draws = list(group)
            condition, images = draws[0][0][0], draws[0][1][2]
            top1 = [counts[0] / images for _, counts, _ in draws]
            rows.append(
                {
                    "name": condition.name,
                    "mode": condition.mode,
                    "images": images,
                    "right": [counts[0] for _, counts, _ in draws],
                    "top1": statistics.fmean(top1),
                    "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
                    "top5": statistics.fmean(counts[1] / images for _, counts, _ in draws),
                    "loss": statistics.fmean(loss / images for _, _, loss in draws),
                }
            )
        return rows


def check_resolutions(model: nn.Module, conditions: Sequence[Condition], shape: Sequence[int]) -> None:
    """Check that a network has routers at the resolutions of each condition.

    Args:
        model: that is inspected.
        conditions: with or without resolutions.
        shape: ``(C, H, W)`` of an image.

    Raises:
        ValueError: it has none; the message lists those that it has.
    """
    seen: set[int] = set()

    def see(layer: str, x: Tensor | None, weights: Tensor) -> Tensor:
        seen.update([x.shape[2]] if x is not None and x.dim() == 4 else [])
        return weights

    with evaluating(model), torch.no_grad(), replaced(model, see):
        model(empty_images(model, 2, shape))
    for condition in conditions:
        if condition.resolutions is not None and not seen & set(condition.resolutions):
            raise ValueError(
                f"resolutions={condition.resolutions} of {condition.name!r}: no router sees such a map; there are "
                f"{sorted(seen, reverse=True)} rows"
            )


class WholeBatches(LightningDataModule):
    """Gives each image of a loader once, in batches that are the same on any number of ranks, which take turns.

    A last batch of one image, in which nothing could be shuffled, joins the one before it.

    Args:
        loader: over a data set with a length; its order and sampler are left aside.
        data: that the loader is of; its hooks change batches as they do elsewhere.
    """

    def __init__(self, loader: DataLoader, data: LightningDataModule | None = None) -> None:
        super().__init__()
        self.loader = loader
        self.data = data or LightningDataModule()
        self.length = len(loader.dataset)  # type: ignore[arg-type]
        self.batch_size = loader.batch_size or 1
        whole, rest = divmod(self.length, self.batch_size)
        ends = [self.batch_size * (number + 1) for number in range(whole)]
        if rest > 1 or not ends:
            ends.append(self.length)
        ends[-1] = self.length
        self.batches = [range(start, end) for start, end in itertools.pairwise([0, *ends])]

    def check(self, conditions: Sequence[Condition], ranks: int = 1) -> None:
        """Check that there is a batch for each rank, and another image in each batch where a condition needs one.

        Raises:
            ValueError: there is none.
        """
        size = f"{self.length} images in batches of {self.batch_size} (data.init_args.batch_size)"
        if len(self.batches) < ranks:
            raise ValueError(f"trainer.devices={ranks}, but {size} are {len(self.batches)} batches: take fewer devices")
        for condition in conditions:
            if condition.across_images and min(map(len, self.batches)) < 2:
                raise ValueError(f"{condition.name!r} needs 2 images in a batch, but there are {size}")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do as the data do."""
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Do as the data do."""
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do as the data do."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def test_dataloader(self) -> DataLoader:
        """Load this rank's batches."""
        assert self.trainer is not None
        self.data.trainer = self.trainer  # which its hooks may ask
        ranks = self.trainer.world_size
        return DataLoader(
            self.loader.dataset,
            batch_sampler=_Batches(self.batches[self.trainer.global_rank :: ranks]),
            num_workers=self.loader.num_workers,
            collate_fn=self.loader.collate_fn,
            pin_memory=self.loader.pin_memory,
        )

    def places(self, batch_idx: int) -> Tensor:
        """Give the numbers of the images in this rank's batch."""
        assert self.trainer is not None
        batch = self.batches[batch_idx * self.trainer.world_size + self.trainer.global_rank]
        return torch.arange(batch.start, batch.stop)


class _Batches(Sampler):
    def __init__(self, batches: list[range]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(map(list, self.batches))

    def __len__(self) -> int:
        return len(self.batches)


def uniform(seed: int, places: Tensor) -> Tensor:
    """Draw a number from [0, 1) for each place, whatever other places there are (SplitMix64's finalizer).

    Args:
        seed: of the sequence.
        places: whole numbers in any shape.

    Returns:
        float64, of the same shape.

    Example:
        >>> bool(uniform(1, torch.arange(5))[3] == uniform(1, torch.tensor([3, 7]))[0])
        True
    """
    z = np.uint64(seed) + (places.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(np.asarray((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53)
