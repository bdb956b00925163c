"""The arithmetic of a convolution's sizes."""

import math
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What ``F.conv2d`` takes after the bias, in its order."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def output_size(size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Give the rows and columns of a convolution's output, as ``nn.Conv2d`` has them.

    Example:
        >>> output_size((15, 7), (3, 3), (2, 2), (1, 1), (1, 1))
        (8, 4)
    """
    rows, columns = (output_length(size[i], kernel_size[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return rows, columns


def output_length(size: int, length: int, step: int, zeros: int, distance: int) -> int:
    """Give the output's length along one axis."""
    return (size + 2 * zeros - distance * (length - 1) - 1) // step + 1


def padding_in_numbers(
    input: tuple[int, ...], padding: Pair | str, kernel_size: Pair, stride: Pair, dilation: Pair
) -> tuple[tuple[int, ...], Pair]:
    """Turn "same" and "valid" into numbers: what one side has more of, for ``F.pad``, and what both sides have."""
    if not isinstance(padding, str):
        return (), padding
    if padding == "valid":
        return (), (0, 0)
    rows, columns = (
        max(0, (math.ceil(size / step) - 1) * step + distance * (length - 1) + 1 - size)
        for size, length, step, distance in zip(input[2:], kernel_size, stride, dilation, strict=True)
    )
    return (0, columns % 2, 0, rows % 2) if rows % 2 or columns % 2 else (), (rows // 2, columns // 2)


def is_depthwise(weight: tuple[int, ...], groups: int) -> bool:
    """Tell whether each group has one input channel."""
    return weight[2] == 1 < groups


def positions(input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> Pair:
    """Give the output's rows and columns, for an input ``(..., H, W)`` and weights ``(..., kH, kW)``."""
    stride, padding, dilation, _ = geometry
    return output_size((input[-2], input[-1]), (weight[-2], weight[-1]), stride, padding, dilation)
