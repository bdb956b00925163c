from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dyn_lightning.functional import prepared
from tests.per_sample.loop import assert_equals_the_loop, draw


@pytest.mark.parametrize("method", ["auto", "grouped", "matmul", "mixture", "chunked"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 2), (1, 4)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 2, 1), (2, 2, 1), ((3, 2), (4, 3), 2), (1, "same", 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_rows_and_columns_that_see_only_padding(
    stride: Any, padding: Any, dilation: Any, kernel_size: Any, size: Any, method: str
) -> None:
    tensors = draw(2, size, kernel_size)
    assert_equals_the_loop(tensors, method, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "kept", "left"),
    [
        ((1, 1), 1, 1, (1, 1), (0, 0)),
        ((2, 2), 2, 1, (2, 2), (0, 0)),
        ((2, 2), 1, 1, (3, 3), (1, 1)),
        ((1, 5), 1, 1, (1, 3), (0, 1)),
    ],
)
def test_they_are_cut_off(size: Any, stride: int, padding: int, kept: Any, left: Any) -> None:
    input, _, weight, _ = draw(2, size)
    _, cut, geometry = prepared(input, weight, stride, padding, 1, 1)
    assert cut.shape[3:] == kept
    assert geometry.padding == left


def test_a_strided_1x1_convolution_sees_every_other_pixel() -> None:
    input, _, weight, _ = draw(kernel_size=(1, 1))
    pixels, _, geometry = prepared(input, weight, (2, 3), 0, 1, 1)
    assert geometry.stride == (1, 1)
    assert torch.equal(pixels, F.avg_pool2d(input, 1, (2, 3)))
