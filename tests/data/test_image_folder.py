import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from dyn_lightning.data import ImageFolder
from dyn_lightning.data.image_folder import MEAN, STD

CLASSES = ("ant", "bee", "cat")


def save(pixels: Tensor, path: Path) -> None:
    to_pil_image(pixels).save(path)


def make_images(root: Path) -> Path:
    """Make images of unequal sizes in three classes: 9 to train, 6 to validate, 3 to test."""
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (12 + 5 * number, 20 + index)
                pixels = torch.randint(256, (3, *size), dtype=torch.uint8)
                save(pixels, folder / f"{number}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_images(tmp_path)


def make(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"image_size": 14, "batch_size": 3, "num_workers": 0, **options})


def test_says_what_the_images_are(root: Path) -> None:
    data = make(root)
    assert (data.num_classes, data.channels, data.image_size, data.class_names) == (3, 3, 14, CLASSES)
    assert [len(data.train_set), len(data.val_set), len(data.test_set)] == [9, 6, 3]


def test_loads_batches(root: Path) -> None:
    data = make(root)
    for loader, expected in (
        (data.train_dataloader(), [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (data.val_dataloader(), [0, 0, 1, 1, 2, 2]),
        (data.test_dataloader(), [0, 1, 2]),
    ):
        batches = [*loader]
        assert {images.shape for images, _ in batches} == {(3, 3, 14, 14)}
        assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == expected


def test_normalises_as_imagenet(root: Path) -> None:
    colour = torch.tensor([255, 0, 51], dtype=torch.uint8)
    save(colour[:, None, None].expand(3, 30, 20), root / "val" / "ant" / "0.png")
    expected = (colour / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    image, label = make(root).val_set[0]
    assert label == 0
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 14, 14))


def test_evaluation_takes_the_centre(root: Path) -> None:
    """An image of 16 x 32 px is as large as it must be: columns 9 to 22, rows 1 to 14."""
    pixels = torch.randint(256, (3, 16, 32), dtype=torch.uint8)
    save(pixels, root / "val" / "ant" / "0.png")
    image, _ = make(root).val_set[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(image * std + mean, pixels[:, 1:15, 9:23] / 255, atol=1e-6, rtol=0)


def test_augments_training_images_alone(root: Path) -> None:
    data = make(root)
    assert not torch.equal(data.train_set[0][0], data.train_set[0][0])
    assert torch.equal(data.val_set[0][0], data.val_set[0][0])


def test_grey_images_become_colour(root: Path) -> None:
    save(torch.randint(256, (1, 20, 20), dtype=torch.uint8), root / "val" / "ant" / "0.png")
    assert make(root).val_set[0][0].shape == (3, 14, 14)


def test_the_test_split_is_optional(root: Path) -> None:
    shutil.rmtree(root / "test")
    assert make(root).test_set is None


def test_another_split_can_be_tested(root: Path) -> None:
    data = make(root, test="val")
    assert data.test_set.root == data.val_set.root == str(root / "val")
    with pytest.raises(ValueError, match=re.escape(f"{root / 'vla'} must hold a folder of images for each class")):
        make(root, test="vla")


def test_refuses_a_missing_root(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    expected = f"root={str(missing)!r} must hold train/CLASS/*.jpg and val/CLASS/*.jpg; {missing / 'train'} is missing"
    with pytest.raises(ValueError, match=re.escape(expected)):
        make(missing)


@pytest.mark.parametrize("split", ["train", "val"])
def test_refuses_a_missing_split(root: Path, split: str) -> None:
    shutil.rmtree(root / split)
    with pytest.raises(ValueError, match=re.escape(f"{root / split} is missing")):
        make(root)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_refuses_an_empty_split(root: Path, split: str) -> None:
    shutil.rmtree(root / split)
    (root / split).mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{root / split} must hold a folder of images for each class")):
        make(root)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_refuses_a_class_without_images(root: Path, split: str) -> None:
    (root / split / "dog").mkdir()
    with pytest.raises(ValueError, match=rf"{re.escape(str(root / split))} must hold a folder of images.*\bdog\b"):
        make(root)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("change", ["more", "fewer", "renamed"])
def test_refuses_other_classes(root: Path, split: str, change: str) -> None:
    ant, dog = root / split / "ant", root / split / "dog"
    {"more": shutil.copytree, "fewer": lambda ant, dog: shutil.rmtree(ant), "renamed": shutil.move}[change](ant, dog)
    count, names = {"more": (4, "dog"), "fewer": (2, "ant"), "renamed": (3, "ant, dog")}[change]
    expected = (
        f"{root / split} has {count} classes and the training images have 3; these are in one of them only: {names}"
    )
    with pytest.raises(ValueError, match=re.escape(expected) + "$"):
        make(root)


def test_refuses_no_pixels(root: Path) -> None:
    with pytest.raises(ValueError, match="image_size=0 must be at least 1"):
        make(root, image_size=0)
