from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.per_sample.geometry import Geometry, output_size
from dyn_lightning.per_sample.methods import matmul, mix_kernels
from tests.contract import GEOMETRIES


def test_mix_kernels_of_one_open_kernel() -> None:
    weight = torch.randn(3, 6, 4, 3, 2)
    assert torch.equal(mix_kernels(torch.eye(3)[[2, 0]], weight), weight[[2, 0]])


@pytest.mark.parametrize(("stride", "padding", "dilation"), [g for g in GEOMETRIES if g[1] != "same"])
def test_output_size(stride: Any, padding: Any, dilation: Any) -> None:
    conv = nn.Conv2d(1, 1, (3, 2), stride, padding, dilation)
    expected = conv(torch.zeros(1, 1, 15, 8)).shape[2:]
    assert output_size((15, 8), (3, 2), conv.stride, conv.padding, conv.dilation) == expected


class Copied(TorchDispatchMode):
    """Notes how many numbers each copy has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.numbers.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_product_copies_neither_maps_nor_mixed_kernels(layout: torch.memory_format) -> None:
    input = torch.randn(9, 8, 4, 4).contiguous(memory_format=layout).requires_grad_()
    routing, weight = torch.randn(9, 3, requires_grad=True), torch.randn(3, 16, 8, 1, 1, requires_grad=True)
    with Copied() as copied:
        y = matmul(input, routing, weight, Geometry((1, 1), (0, 0), (1, 1), 1))
        gradients = torch.autograd.grad(y, (input, routing, weight), torch.randn_like(y))
    assert y.is_contiguous(memory_format=layout)
    assert gradients[0].is_contiguous(memory_format=layout)
    assert max(copied.numbers, default=0) <= weight.numel() < min(input.numel(), 9 * 16 * 8)


@pytest.mark.parametrize("method", ["grouped", "matmul", "mixture", "chunked"])
@pytest.mark.parametrize(("groups", "kernel"), [(1, 3), (8, 3), (1, 1), (2, 1)])
def test_one_image_in_channels_last_has_torchs_strides(method: str, groups: int, kernel: int) -> None:
    """Otherwise the next convolution would take it for contiguous."""
    x = torch.randn(1, 8, 5, 6).to(memory_format=torch.channels_last)
    weight, bias, routing = torch.randn(4, 8, 8 // groups, kernel, kernel), torch.randn(4, 8), torch.rand(1, 4)
    expected = F.conv2d(x, weight[0], None, 1, kernel // 2, 1, groups)
    for given in (None, bias):
        for grads in (True, False):
            with torch.set_grad_enabled(grads):
                options = {"padding": kernel // 2, "groups": groups, "method": method}
                y = dynamic_conv2d(x, routing, weight, given, **options)
            assert y.stride() == expected.stride()
