"""Reads batches and loaders of whatever form."""

import math
from collections.abc import Sequence, Sized
from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader


def images_and_labels(batch: Any, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Find the images and their classes in a batch of whatever form."""
    tensors = [tensor for tensor in _tensors(batch) if len(tensor) == size]
    images = [tensor for tensor in tensors if tensor.dim() == 4 and tensor.is_floating_point()]
    labels = [tensor for tensor in tensors if tensor.dim() == 1 and not tensor.is_floating_point()]
    return (images[0] if images else None), (labels[0].long() if labels else None)


def batch_size(batch: Any, weights: dict[str, Tensor]) -> int:
    """Count the images of a batch: they are its first tensor, or as many as most layers have rows."""
    tensors = _tensors(batch)
    rows = [len(value) for value in weights.values()]
    return len(tensors[0]) if tensors else max(rows, key=rows.count)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def loader_length(loaders: Any, batches: Sequence[float] | float) -> float:
    """Say how many images the first loader gives at most; infinite if nobody knows."""
    loader = first_loader(loaders)
    count = batches[0] if isinstance(batches, Sequence) else batches
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    at_most = count * size if size else math.inf
    sampler = getattr(loader, "sampler", None)
    return min(at_most, len(sampler)) if isinstance(sampler, Sized) else at_most


def first_loader(loaders: Any) -> DataLoader | None:
    """Find the first of one or several loaders."""
    while isinstance(loaders, (list, tuple, dict)):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
    return loaders


def class_names(trainer: Trainer) -> Sequence[str]:
    """Give the names of the data's classes, or nothing."""
    return getattr(trainer.datamodule, "class_names", ())  # type: ignore[attr-defined]
