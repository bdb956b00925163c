"""The gradient of depthwise kernels against torch's, which it stands in for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import depthwise
from dyn_lightning.per_sample.depthwise import convolve, has_slow_gradient, kernels_gradient
from dyn_lightning.per_sample.geometry import Geometry
from tests.tolerances import assert_close

CHANNELS = 3
# Kernel's rows and columns, stride, padding, the map's rows and columns.
SHAPES = [
    ((5, 5), (1, 1), (2, 2), (7, 6)),
    ((5, 5), (2, 2), (2, 2), (8, 9)),
    ((5, 4), (2, 1), (0, 3), (9, 5)),
    ((3, 7), (1, 2), (1, 3), (4, 11)),
    ((3, 3), (1, 1), (1, 1), (2, 2)),
    ((3, 3), (2, 2), (1, 1), (3, 3)),
    ((7, 7), (3, 2), (6, 0), (5, 12)),
    ((2, 9), (1, 1), (0, 4), (2, 1)),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small maps have the gradient too."""
    monkeypatch.setattr(depthwise, "LEAST_NUMBERS", 0)


def _tensors(kernel: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(1, CHANNELS, *size, dtype=torch.float64, requires_grad=True),
        torch.randn(CHANNELS, 1, *kernel, dtype=torch.float64, requires_grad=True),
    )


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), SHAPES)
def test_equals_torchs(
    always: None, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int]
) -> None:
    x, kernels = _tensors(kernel, size)
    geometry = Geometry(stride, padding, (1, 1), CHANNELS)
    assert has_slow_gradient(x.shape, kernels.shape, geometry, "cpu")
    expected = F.conv2d(x, kernels, None, *geometry)
    output, cotangent = convolve(x, kernels, geometry), torch.randn_like(expected)
    assert "_Convolution" in type(output.grad_fn).__name__
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    ours, theirs = (torch.autograd.grad(y, (x, kernels), cotangent) for y in (output, expected))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(kernels_gradient(cotangent, x, kernels, geometry), theirs[1])


def test_derivatives_of_any_order(always: None) -> None:
    x, kernels = _tensors((3, 5), (4, 5))
    geometry = Geometry((1, 2), (1, 2), (1, 1), CHANNELS)
    function = lambda x, kernels: convolve(x, kernels, geometry)  # noqa: E731
    assert gradcheck(function, (x, kernels))
    assert gradgradcheck(function, (x, kernels))
    assert gradcheck(function, (x.detach(), kernels))
    assert gradcheck(function, (x, kernels), check_batched_grad=True)


@pytest.mark.parametrize("method", ["grouped", "chunked"])
def test_of_mixed_kernels(method: str) -> None:
    torch.manual_seed(0)
    x, routing, weight = torch.randn(4, 96, 20, 20), torch.rand(4, 3), torch.randn(3, 96, 1, 5, 5)
    tensors = [tensor.requires_grad_() for tensor in (x, routing, weight)]

    def gradients(method: str) -> tuple[Tensor, ...]:
        y = dynamic_conv2d(x, routing, weight, padding=2, groups=96, method=method)
        return torch.autograd.grad(y, tensors, torch.ones_like(y))

    assert has_slow_gradient((1, 384, 20, 20), (384, 1, 5, 5), Geometry((1, 1), (2, 2), (1, 1), 384), "cpu")
    for found, expected in zip(gradients(method), gradients("matmul"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_keeps_channels_last() -> None:
    x = torch.randn(1, 2048, 14, 14).to(memory_format=torch.channels_last).requires_grad_()
    kernels = torch.randn(2048, 1, 5, 5, requires_grad=True)
    y = convolve(x, kernels, Geometry((1, 1), (2, 2), (1, 1), 2048))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "slow"),
    [
        (3, 1, 1, 3, False),  # three rows, two of zeros
        (3, 1, 1, 2, True),
        (3, 2, 1, 4, False),  # two rows, zeros above them alone
        (3, 2, 1, 3, True),
        (1, 1, 0, 1, False),
        (5, 1, 2, 28, True),
    ],
)
def test_where_torchs_is_slow(kernel: int, stride: int, padding: int, size: int, slow: bool) -> None:
    x, kernels = (1, 4096, size, size), (4096, 1, kernel, kernel)
    geometry = Geometry((stride, stride), (padding, padding), (1, 1), 4096)
    assert has_slow_gradient(x, kernels, geometry, "cpu") == slow
    assert not has_slow_gradient(x, kernels, geometry, "cuda")
    assert not has_slow_gradient(x, kernels, geometry._replace(dilation=(2, 2)), "cpu")
    assert not has_slow_gradient((1, 2, *x[2:]), (2, *kernels[1:]), geometry._replace(groups=2), "cpu")


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_does_without(strict: bool) -> None:
    layer = DynamicConv2d(64, 64, 5, padding=2, groups=64)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    exported = torch.export.export(layer, (torch.randn(40, 64, 9, 9),), dynamic_shapes=dynamic, strict=strict)
    x = torch.randn(3, 64, 9, 9)
    assert_close(exported.module()(x), layer(x))


def test_compiled() -> None:
    torch.manual_seed(0)
    layer = DynamicConv2d(64, 64, 5, padding=2, groups=64)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(40, 64, 9, 9, requires_grad=True)
    found, expected = (
        torch.autograd.grad(function(x).square().mean(), [x, *layer.parameters()]) for function in (compiled, layer)
    )
    assert has_slow_gradient((1, 2560, 9, 9), (2560, 1, 5, 5), Geometry((1, 1), (2, 2), (1, 1), 2560), "cpu")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
