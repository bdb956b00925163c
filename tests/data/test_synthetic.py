from typing import Any

import pytest
import torch

from dyn_lightning.data import Synthetic

SMALL = {"num_images": 130, "num_classes": 7, "channels": 4, "image_size": 6, "batch_size": 5}


def test_shapes() -> None:
    data = Synthetic(**SMALL)
    assert (data.num_classes, data.channels, data.image_size) == (7, 4, 6)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (5, 4, 6, 6)
        assert labels.shape == (5,)


@pytest.mark.parametrize(("images", "expected"), [(130, 13), (19, 1), (1, 1)])
def test_validation_has_a_tenth(images: int, expected: int) -> None:
    data = Synthetic(**SMALL | {"num_images": images})
    assert [len(data.train_set), len(data.val_set), len(data.test_set)] == [images, expected, expected]
    assert [len(loader) for loader in (data.val_dataloader(), data.test_dataloader())] == [-(-expected // 5)] * 2


def test_every_class_occurs() -> None:
    assert {int(label) for _, label in Synthetic(**SMALL).train_set} == set(range(7))


def test_is_standard_noise() -> None:
    images = torch.stack([image for image, _ in Synthetic(**SMALL | {"image_size": 32}).train_set])
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)


def test_is_always_the_same() -> None:
    first = [*Synthetic(**SMALL).train_set]
    torch.manual_seed(1)
    for (image, label), (other, other_label) in zip(first, [*Synthetic(**SMALL).train_set], strict=True):
        assert torch.equal(image, other)
        assert label == other_label


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"num_classes": 0}, {"channels": -1}, {"image_size": 0}], ids=str)
def test_refuses_a_count_below_one(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        Synthetic(**SMALL | wrong)
