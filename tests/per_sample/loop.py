"""The per-sample convolution, one sample at a time, and tensors to try it on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyn_lightning.functional import MAX_MIXED_BYTES, dynamic_conv2d
from tests.tolerances import assert_close


def draw(
    batch: int = 2,
    size: tuple[int, int] = (7, 6),
    kernel_size: tuple[int, int] = (3, 3),
    groups: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """Draw input, routing, weight and bias: 4 -> 6 channels, 3 kernels."""
    shapes = [(batch, 4, *size), (batch, 3), (3, 6, 4 // groups, *kernel_size), (3, 6)]
    return tuple(
        torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes[: 4 if bias else 3]
    )


def loop(
    input: Tensor, routing: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **geometry: Any
) -> Tensor:
    """Convolve one sample at a time."""
    outputs = []
    for image, shares in zip(input, routing, strict=True):
        kernel = sum(share * kernel for share, kernel in zip(shares, weight, strict=True))
        mixed = None if bias is None else sum(share * row for share, row in zip(shares, bias, strict=True))
        outputs.append(F.conv2d(image[None], kernel, mixed, *args, **geometry))
    return torch.cat(outputs)


def assert_equals_the_loop(
    tensors: tuple[Tensor, ...], method: str, max_mixed_bytes: int = MAX_MIXED_BYTES, **geometry: Any
) -> None:
    actual = dynamic_conv2d(*tensors, method=method, max_mixed_bytes=max_mixed_bytes, **geometry)
    expected = loop(*tensors, **geometry)
    assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    assert_close(torch.autograd.grad(actual, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent))
