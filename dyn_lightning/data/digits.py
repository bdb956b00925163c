"""The built-in data: scikit-learn's 1,797 handwritten digits (UCI Optical Recognition of Handwritten Digits)."""

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from dyn_lightning.data.module import ImageDataModule

# Mean and standard deviation of the 1,797 images, scaled to [0, 1].
MEAN, STD = 0.3053, 0.3760


class Digits(ImageDataModule):
    """1,797 grey 8x8 images of ten digits, resized; 1,257 to train, 180 to validate, 360 to test, always the same.

    Nothing is downloaded. Every class has its share of each split.

    Args:
        image_size: rows and columns after bilinear resizing.
        batch_size: images a step and rank.
        num_workers: processes that load images; the data are small and in memory, so 0 is fastest.

    Raises:
        ValueError: an image size or batch size below 1, a negative number of workers.

    Example:
        >>> images, labels = next(iter(Digits(batch_size=4).val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([4, 1, 32, 32]), torch.Size([4]))
    """

    class_names = tuple("0123456789")
    mean, std = MEAN, STD

    def __init__(self, image_size: int = 32, batch_size: int = 64, num_workers: int = 0) -> None:
        # Here, because importing scikit-learn takes a third of a second, which `fit --help` need not wait for.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        super().__init__(10, 1, image_size, batch_size, num_workers)
        pixels, labels = load_digits(return_X_y=True)
        images = (torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16 - MEAN) / STD
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=False)
        dataset = TensorDataset(images, torch.from_numpy(labels))
        rest, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
        self.train_set: Dataset = Subset(dataset, train)
        self.val_set: Dataset = Subset(dataset, val)
        self.test_set: Dataset | None = Subset(dataset, test)
