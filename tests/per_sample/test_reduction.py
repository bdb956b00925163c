from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dyn_lightning.per_sample.reduction import plan_of, reduced
from tests.per_sample.loop import assert_equals_the_loop, draw


@pytest.mark.parametrize("method", ["auto", "grouped", "matmul", "mixture", "chunked"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 2), (1, 4), (5, 3)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 2, 1), (2, 2, 1), ((3, 2), (4, 3), 2), (1, "same", 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_rows_and_columns_that_see_only_padding(
    stride: Any, padding: Any, dilation: Any, groups: int, kernel_size: Any, size: Any, method: str
) -> None:
    shapes = ((2, 4, *size), (2, 3), (3, 8, 4 // groups, *kernel_size))
    tensors = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert_equals_the_loop(tensors, method, stride=stride, padding=padding, dilation=dilation, groups=groups)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "padding", "kept", "left"),
    [
        ((1, 1), 3, 1, 1, (1, 1), (0, 0)),
        ((2, 2), 5, 2, 2, (2, 2), (0, 0)),
        ((1, 5), 7, 1, 3, (1, 7), (0, 3)),
        ((2, 2), 3, 1, 1, (3, 3), (1, 1)),
        ((2, 2), 3, 2, 1, (3, 3), (1, 1)),  # more is left than pays
    ],
)
def test_they_are_cut_off(
    size: Any, kernel_size: int, stride: int, padding: int, kept: tuple[int, int], left: tuple[int, int]
) -> None:
    input, _, weight, _ = draw(2, size, (kernel_size, kernel_size))
    plan = plan_of(input.shape, weight.shape, (stride, stride), (padding, padding), (1, 1), 1, training=True)
    assert plan.weight[3:] == reduced(input, weight, plan)[1].shape[3:] == kept
    assert plan.geometry.padding == left


@pytest.mark.parametrize(
    ("batch", "channels", "training", "kept"),
    [(2, 8, True, (2, 2)), (2, 8, False, (3, 3)), (32, 2048, False, (2, 2)), (1, 100_000, True, (3, 3))],
)
def test_depthwise_kernels_are_cut_where_that_saves_more_than_it_costs(
    batch: int, channels: int, training: bool, kept: tuple[int, int]
) -> None:
    sizes = ((batch, channels, 2, 2), (4, channels, 1, 3, 3))
    plan = plan_of(*sizes, (2, 2), (1, 1), (1, 1), channels, training)
    assert plan.weight[3:] == kept


def test_a_strided_1x1_convolution_sees_every_other_pixel() -> None:
    input, _, weight, _ = draw(kernel_size=(1, 1))
    plan = plan_of(input.shape, weight.shape, (2, 3), (0, 0), (1, 1), 1, training=True)
    pixels, _ = reduced(input, weight, plan)
    assert plan.geometry.stride == (1, 1)
    assert plan.input == pixels.shape
    assert torch.equal(pixels, F.avg_pool2d(input, 1, (2, 3)))


def test_a_strided_map_is_contiguous_when_it_is_padded() -> None:
    input = torch.randn(2, 16, 12, 6).contiguous(memory_format=torch.channels_last)[:, :, ::2]
    weight = torch.randn(3, 16, 1, 3, 3)
    plan = plan_of(input.shape, weight.shape, (2, 2), "same", (1, 1), 16, training=True)
    assert plan.zeros
    assert reduced(input, weight, plan)[0].is_contiguous()
