"""Noise with labels, for measuring speed."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dyn_lightning.checks import check_count
from dyn_lightning.data.module import ImageDataModule

POOL = 64


class Synthetic(ImageDataModule):
    """Images of Gaussian noise with random labels: the loader costs next to nothing, and nothing can be learned.

    Args:
        num_images: of the training set; validation and test have a tenth, at least one.
        num_classes: classes.
        channels: of an image.
        image_size: rows and columns of an image.
        batch_size: images a step and rank.
        num_workers: processes that load images.

    Raises:
        ValueError: a count below 1, a negative number of workers.

    Example:
        >>> images, labels = next(iter(Synthetic(image_size=16, batch_size=4).train_dataloader()))
        >>> images.shape
        torch.Size([4, 3, 16, 16])
    """

    def __init__(
        self,
        num_images: int = 1280,
        num_classes: int = 1000,
        channels: int = 3,
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(num_classes, channels, image_size, batch_size, num_workers)
        for name, value in (("num_images", num_images), ("num_classes", num_classes), ("channels", channels)):
            check_count(name, value)
        self.train_set: Dataset = _Noise(num_images, num_classes, channels, image_size)
        self.val_set: Dataset = _Noise(max(1, num_images // 10), num_classes, channels, image_size)
        self.test_set: Dataset | None = self.val_set


class _Noise(Dataset):
    """A pool of images, given again and again under random labels."""

    def __init__(self, length: int, num_classes: int, channels: int, image_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(min(length, POOL), channels, image_size, image_size, generator=generator)
        self.labels = torch.randint(num_classes, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[index % len(self.images)], self.labels[index]
