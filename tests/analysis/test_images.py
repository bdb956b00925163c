import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dyn_lightning.analysis.images import squared, thumbnails

NAN, INF = math.nan, math.inf
PER_CHANNEL = ([0.1, 0.2, 0.3], [0.5, 0.25, 2.0])


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


class TestColours:
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 0.2), (0, 1), PER_CHANNEL, ([0.4], [0.2])])
    def test_normalisation_is_undone(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        original = random_bytes(2, 3, 4, 5)
        shift, scale = (torch.tensor(value).reshape(-1, 1, 1) for value in (mean, std))
        assert torch.equal(thumbnails((original / 255 - shift) / scale, 8, mean, std), original)

    def test_a_mean_a_channel_by_hand(self) -> None:
        images = torch.tensor([1.0, 2.0, 0.1])[None, :, None, None]
        assert thumbnails(images, 8, *PER_CHANNEL).flatten().tolist() == [153, 178, 128]  # 0.6, 0.7 and 0.5 of 255

    def test_values_outside_are_clipped(self) -> None:
        images = torch.tensor([-0.5, 0.0, 1.0, 1.5, INF, -INF]).reshape(1, 1, 2, 3)
        assert thumbnails(images, 8, 0.0, 1.0)[0, 0].tolist() == [[0, 0, 255], [255, 255, 0]]

    def test_each_image_is_stretched(self) -> None:
        first, second = [[-2.0, 0.0], [2.0, 8.0]], [[100.0, 101.0], [105.0, 100.0]]
        small = thumbnails(torch.tensor([[first], [second]]), 8)
        assert small[:, 0].tolist() == [[[0, 51], [102, 255]], [[0, 51], [255, 0]]]

    def test_channels_are_stretched_together(self) -> None:
        images = torch.tensor([1.0, 2.0, 6.0])[None, :, None, None]
        assert thumbnails(images, 8).flatten().tolist() == [0, 51, 255]

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("value", [-3.0, 0.0, 0.6])
    def test_constant_images(self, value: float, channels: int) -> None:
        images = torch.full((2, channels, 4, 5), value)
        assert (thumbnails(images, 8) == 0).all()
        assert (thumbnails(images, 8, 0.0, 1.0) == {-3.0: 0, 0.0: 0, 0.6: 153}[value]).all()

    @pytest.mark.parametrize("channels", [1, 2, 4, 5])
    def test_other_than_three_channels_are_grey(self, channels: int) -> None:
        original = random_bytes(2, channels, 4, 5)
        small = thumbnails(original / 255, 8, 0.0, 1.0).double()
        assert small.shape == (2, 3, 4, 5)
        assert (small - original.double().mean(1, keepdim=True)).abs().max() < 0.51

    def test_a_mean_for_each_of_five_channels(self) -> None:
        images = torch.zeros(1, 5, 1, 1)
        assert thumbnails(images, 8, [0.0, 0.2, 0.4, 0.6, 0.8], [1.0] * 5).flatten().tolist() == [102] * 3


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "side", "expected"),
        [
            ((56, 28), 32, (32, 16)),
            ((28, 56), 32, (16, 32)),
            ((9, 7), 4, (4, 3)),
            ((100, 1), 8, (8, 1)),
            ((2, 90), 3, (1, 3)),
            ((5, 4), 8, (5, 4)),
            ((8, 6), 8, (8, 6)),
        ],
    )
    @pytest.mark.parametrize("channels", [1, 3, 5])
    def test_the_longer_side(self, size: tuple[int, int], side: int, expected: tuple[int, int], channels: int) -> None:
        assert thumbnails(torch.rand(2, channels, *size), side).shape == (2, 3, *expected)
        assert thumbnails(torch.rand(0, channels, *size), side, 0.5, 0.5).shape == (0, 3, *expected)

    def test_pixels_are_averaged(self) -> None:
        original = random_bytes(2, 3, 4, 6)
        small = thumbnails(original / 255, 3, 0.0, 1.0).double()
        assert small.shape == (2, 3, 2, 3)
        for row in range(2):
            for column in range(3):
                block = original[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].double()
                assert (small[:, :, row, column] - block.mean((2, 3))).abs().max() < 0.51

    def test_stretched_before_they_are_averaged(self) -> None:
        images = torch.tensor([[0.0, 2.0, 4.0, 10.0]] * 2).reshape(1, 1, 2, 4)
        assert thumbnails(images, 2)[0, 0].tolist() == [[26, 178]]  # 0.1 and 0.7 of 255 are 25.5 and 178.5


class TestNotFinite:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_nan_is_black(self, channels: int) -> None:
        images = torch.full((2, channels, 2, 3), 0.8)
        images[1, 0, 0, 2] = NAN
        small = thumbnails(images, 8, 0.0, 1.0)
        assert small[1, 0].tolist() == [[204, 204, 0], [204, 204, 204]]
        assert (small[0] == 204).all()

    def test_other_images_are_stretched_as_ever(self) -> None:
        images = torch.rand(3, 1, 4, 5)
        broken = images.clone()
        broken[1] = NAN
        assert torch.equal(thumbnails(broken, 8)[[0, 2]], thumbnails(images, 8)[[0, 2]])
        assert (thumbnails(broken, 8)[1] == 0).all()

    @pytest.mark.parametrize(("value", "shown"), [(NAN, 0), (-INF, 0), (INF, 255)])
    def test_the_other_pixels_are_stretched(self, value: float, shown: int) -> None:
        images = torch.tensor([[2.0, 3.0, value], [7.0, 4.0, 2.0]])[None, None]
        assert thumbnails(images, 8)[0, 0].tolist() == [[0, 51, shown], [255, 102, 0]]

    def test_the_other_channels_are_stretched(self) -> None:
        images = torch.tensor([[2.0, 7.0], [NAN, NAN], [3.0, 4.0]])[None, :, None]
        assert thumbnails(images, 8)[0, :, 0].tolist() == [[0, 255], [0, 0], [51, 102]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mean", [None, 0.0])
def test_bytes_without_a_gradient(dtype: torch.dtype, mean: float | None) -> None:
    images = torch.rand(2, 1, 4, 5, dtype=dtype)
    before = images.clone()
    small = thumbnails(images.requires_grad_(), 3, mean, 1.0)
    assert (small.dtype, small.device.type, small.requires_grad) == (torch.uint8, "cpu", False)
    assert torch.equal(images, before)


class TestSquared:
    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            ([[1, 2, 3]], [[1, 2, 3], [255] * 3, [255] * 3]),
            ([[1, 2], [3, 4], [5, 6]], [[1, 2, 255], [3, 4, 255], [5, 6, 255]]),
            ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ],
    )
    def test_by_hand(self, image: list[list[int]], expected: list[list[int]]) -> None:
        found = squared(torch.tensor(image, dtype=torch.uint8))
        assert found.dtype == torch.uint8
        assert found.tolist() == expected

    @pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 6, 4), (2, 2, 3, 5, 5), (6, 4), (0, 3, 4, 6)])
    def test_is_white_on_the_right_or_below(self, shape: tuple[int, ...]) -> None:
        images = torch.randint(200, shape, dtype=torch.uint8)
        found = squared(images)
        height, width = shape[-2:]
        assert found.shape == (*shape[:-2], max(height, width), max(height, width))
        assert torch.equal(found[..., :height, :width], images)
        assert (found[..., height:, :] == 255).all()
        assert (found[..., :, width:] == 255).all()
