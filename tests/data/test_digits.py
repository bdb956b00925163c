import pytest
import torch
from sklearn.datasets import load_digits

from dyn_lightning.data import Digits

SPLITS = ("train_set", "val_set", "test_set")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(image_size=8)


def test_sizes(digits: Digits) -> None:
    assert [len(getattr(digits, split)) for split in SPLITS] == [1257, 180, 360]


def test_splits_share_no_image_and_hold_all(digits: Digits) -> None:
    indices = [index for split in SPLITS for index in getattr(digits, split).indices]
    assert sorted(indices) == list(range(1797))


def test_images_keep_their_labels(digits: Digits) -> None:
    pixels, labels = load_digits(return_X_y=True)
    for index, (image, label) in zip(digits.val_set.indices, digits.val_set, strict=True):
        assert label == labels[index]
        assert torch.corrcoef(torch.stack([image.flatten(), torch.from_numpy(pixels[index]).float()]))[0, 1] > 0.9999


@pytest.mark.parametrize("split", SPLITS)
def test_each_class_has_its_share(digits: Digits, split: str) -> None:
    dataset = getattr(digits, split)
    expected = torch.from_numpy(load_digits().target).bincount() * len(dataset) / 1797
    counts = torch.stack([label for _, label in dataset]).bincount()
    assert (counts - expected).abs().max() <= 1


def test_splits_are_always_the_same(digits: Digits) -> None:
    torch.manual_seed(1)
    other = Digits(image_size=8)
    for split in SPLITS:
        assert getattr(other, split).indices == getattr(digits, split).indices


def test_pixels_are_normalised(digits: Digits) -> None:
    pixels = torch.stack([image for split in SPLITS for image, _ in getattr(digits, split)])
    assert pixels.mean().item() == pytest.approx(0, abs=1e-3)
    assert pixels.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [1, 8, 17, 32])
def test_image_size(size: int) -> None:
    data = Digits(image_size=size, batch_size=3)
    assert data.image_size == size
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (3, 1, size, size)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_says_what_the_images_are(digits: Digits) -> None:
    assert (digits.num_classes, digits.channels, digits.image_size) == (10, 1, 8)
    assert digits.class_names == tuple("0123456789")
