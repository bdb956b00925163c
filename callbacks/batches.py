"""Reads batches, loaders and data modules of whatever form."""

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

LABELS = ("label", "labels", "target", "targets", "class", "y")  # how data sets call them
MOST_CLASSES = 100_000  # larger numbers are not classes, but say numbers of images


def images_and_labels(batch: Any, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Find the images (B, C, H, W) and their classes (B,), which are negative where nobody knows, in a batch."""
    named = [(place, *each) for place, each in enumerate(_tensors(batch)) if len(each[1]) == size]
    images = [each for each in named if each[2].dim() == 4 and _is_image(each[2])]
    labels = [each for each in named if each[2].dim() == 1 and _whole(each[2])]
    # Stable: else the first. What stands before the images is rather their number.
    labels.sort(key=lambda each: (each[1].lower() not in LABELS, each[0] < (images[0][0] if images else 0)))
    classes = labels[0][2].long() if labels else None
    if classes is not None and size and classes.max() >= MOST_CLASSES:
        classes = None
    return (images[0][2] if images else None), classes


def batch_size(batch: Any, weights: dict[str, Tensor]) -> int:
    """Count the images of a batch: as many as most layers have rows, if a tensor has so many, or its first tensor."""
    lengths = [len(tensor) for _, tensor in _tensors(batch)]
    rows = [len(value) for value in weights.values()]
    most = max(rows, key=rows.count)
    return most if not lengths or most in lengths else lengths[0]


def loader_length(loaders: Any, batches: Sequence[float] | float) -> float:
    """Say how many images the first loader gives at most; infinite if nobody knows."""
    loader = _first(loaders)
    count = batches[0] if isinstance(batches, Sequence) else batches
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    at_most = count * size if size else math.inf
    sampler = _sampler(loader)
    return min(at_most, len(sampler)) if isinstance(sampler, Sized) else at_most


def not_repeated(loaders: Any, places: Tensor) -> Tensor:
    """Say which of the images that this rank's first loader gives no other rank gives too.

    Args:
        loaders: one or several loaders.
        places: numbers of images in the loader's order.
    """
    sampler = _sampler(_first(loaders))
    if not isinstance(sampler, DistributedSampler):
        return torch.ones_like(places, dtype=torch.bool)
    # It gives the first images once more at its end, so that all ranks have as many.
    return places * sampler.num_replicas + sampler.rank < len(sampler.dataset)  # type: ignore[arg-type]


def class_names(trainer: Trainer) -> tuple[str, ...]:
    """Give the names of the data's classes by their numbers, or nothing; users have them in various forms."""
    names: Any = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
    if isinstance(names, Mapping) and names and all(isinstance(label, int) and label >= 0 for label in names):
        return tuple(str(names.get(label, label)) for label in range(min(MOST_CLASSES, max(names) + 1)))
    in_order = (isinstance(names, Sequence) and not isinstance(names, str)) or np.ndim(names) == 1
    return tuple(map(str, names)) if in_order and not isinstance(names, Mapping) else ()


def normalization(trainer: Trainer, channels: int) -> tuple[Any, Any]:
    """Give the mean and standard deviation that the data's pixels were normalised by, or None twice."""
    found = []
    for name in ("mean", "std"):
        try:
            value = np.asarray(getattr(trainer.datamodule, name, None), dtype=float)  # type: ignore[attr-defined]
        except (TypeError, ValueError, RuntimeError):
            return None, None
        if value.size not in (1, channels) or not np.isfinite(value).all():  # None becomes NaN
            return None, None
        found.append(value.reshape(-1).tolist())
    return found[0], found[1]


def _tensors(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a batch, and the names of those that are in a dictionary."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield name, batch
    elif isinstance(batch, dict):
        for key, part in batch.items():
            yield from _tensors(part, str(key))
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part, name)


def _is_image(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def _whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _first(loaders: Any) -> DataLoader | None:
    """Find the first of one or several loaders."""
    while isinstance(loaders, (list, tuple, dict)):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
    return loaders


def _sampler(loader: Any) -> Any:
    """Find what gives a loader its images, which may be inside of what makes the batches."""
    return getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
