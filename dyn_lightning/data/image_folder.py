"""Images on disk, a folder a class, as ImageNet is usually laid out."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from dyn_lightning.data.module import ImageDataModule

# Mean and standard deviation of ImageNet's pixels, which torchvision's pretrained networks expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder(ImageDataModule):
    """Colour images below ``root/train/CLASS``, ``root/val/CLASS`` and, if it exists, ``root/test/CLASS``.

    The labels of ImageNet's test images are not public: papers test on its validation images, as ``test="val"`` does.

    Training images are cropped at random (8 to 100 % of the area) and flipped; the others are resized so that the short
    side is 8/7 of ``image_size`` and cropped in the centre: the usual ImageNet recipe.

    Args:
        root: the folder.
        image_size: rows and columns after cropping.
        batch_size: images a step and rank.
        num_workers: processes that load images.
        test: the folder below ``root`` whose images are tested; without a folder ``test`` none are.

    Raises:
        ValueError: a folder is missing or empty, or the splits have different classes.
    """

    mean, std = MEAN, STD

    def __init__(
        self, root: str, image_size: int = 224, batch_size: int = 32, num_workers: int = 2, test: str = "test"
    ) -> None:
        path = Path(root)
        for split in ("train", "val"):
            if not (path / split).is_dir():
                raise ValueError(
                    f"root={root!r} must hold train/CLASS/*.jpg and val/CLASS/*.jpg; {path / split} is missing"
                )
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        augment = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), *finish])
        centre = v2.Compose([v2.Resize(image_size * 8 // 7, antialias=True), v2.CenterCrop(image_size), *finish])
        train = _folder(path / "train", augment)
        super().__init__(len(train.classes), 3, image_size, batch_size, num_workers)
        self.class_names = tuple(train.classes)
        self.train_set: Dataset = train
        self.val_set: Dataset = self._same_classes(_folder(path / "val", centre))
        self.test_set: Dataset | None = None
        if test != "test" or (path / test).is_dir():
            self.test_set = self._same_classes(_folder(path / test, centre))

    def _same_classes(self, folder: datasets.ImageFolder) -> datasets.ImageFolder:
        if tuple(folder.classes) != self.class_names:
            differ = sorted(set(folder.classes) ^ set(self.class_names))
            raise ValueError(
                f"{folder.root} has {len(folder.classes)} classes and the training images have {self.num_classes}; "
                f"these are in one of them only: {', '.join(differ[:10])}"
            )
        return folder


def _folder(path: Path, transform: v2.Transform) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(path), transform)
    except FileNotFoundError as error:
        raise ValueError(f"{path} must hold a folder of images for each class: {error}") from error
