"""Which of torch's convolutions are taken, of one sample each or with the samples as groups."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.per_sample import convolution
from dyn_lightning.per_sample.convolution import convolve
from dyn_lightning.per_sample.geometry import Geometry
from tests.contract import GEOMETRIES
from tests.per_sample.loop import assert_equals_the_loop, draw, loop
from tests.tolerances import assert_close

METHODS = ["grouped", "chunked"]


def draw_channels_last(batch: int = 3, groups: int = 1, **options: Any) -> tuple[Tensor, ...]:
    """Draw what ``draw`` does, with an input in channels_last."""
    input, *others = draw(batch, groups=groups, **options)
    return input.detach().to(memory_format=torch.channels_last).requires_grad_(), *others


def convolutions(function: Any) -> int:
    """Count the calls of torch's convolution, with or without gradients."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return sum(event.name in ("aten::convolution", "aten::convolution_backward") for event in profile.function_events)


class TestEachSampleByItself:
    @pytest.fixture(autouse=True)
    def _always(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(convolution, "LARGE_MAPS", 0)
        monkeypatch.setattr(convolution, "LARGE_DEPTHWISE_MAPS", 0)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES[::3])
    def test_equals_the_loop(self, method: str, groups: int, stride: Any, padding: Any, dilation: Any) -> None:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        assert_equals_the_loop(draw_channels_last(groups=groups), method, **geometry)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_convolution_for_each_that_keeps_the_layout(self, method: str) -> None:
        tensors, outputs = draw_channels_last(), []
        assert convolutions(lambda: outputs.append(dynamic_conv2d(*tensors, padding=1, method=method))) == 3
        (y,) = outputs
        gradients: list[Tensor] = []
        assert convolutions(lambda: gradients.extend(torch.autograd.grad(y.square().sum(), tensors))) == 3
        with torch.no_grad():
            again = dynamic_conv2d(*tensors, padding=1, method=method)
        for map_ in (y, gradients[0], again):
            assert map_.is_contiguous(memory_format=torch.channels_last)
        assert_close(again, y)

    @pytest.mark.parametrize("method", METHODS)
    def test_few_depthwise_channels(self, method: str) -> None:
        input, routing, weight, bias = draw_channels_last(groups=4, kernel_size=(3, 5))
        assert_equals_the_loop((input, routing, weight[:, :4], bias[:, :4]), method, padding=2, groups=4)

    @pytest.mark.parametrize("needed", [n for n in itertools.product([True, False], repeat=3) if any(n)])
    def test_what_needs_no_gradient(self, needed: tuple[bool, ...]) -> None:
        drawn = zip(draw_channels_last(bias=False), needed, strict=True)
        tensors = [tensor.detach().requires_grad_(need) for tensor, need in drawn]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        outputs = dynamic_conv2d(*tensors, padding=1, method="grouped"), loop(*tensors, padding=1)
        assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in outputs))

    def test_derivatives_of_any_order(self) -> None:
        x, kernels = draw_channels_last(2)[0], torch.randn(2 * 3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
        geometry = Geometry((2, 1), (1, 0), (1, 1), 1)
        assert gradcheck(lambda x, kernels: convolve(x, kernels, geometry), (x, kernels), check_batched_grad=True)
        assert gradgradcheck(lambda x, kernels: convolve(x, kernels, geometry), (x, kernels))

    def test_transforms(self) -> None:
        input, routing, weight, _ = (tensor.detach() for tensor in draw_channels_last())

        def total(method: str) -> Any:
            return lambda shares: dynamic_conv2d(input, shares, weight, method=method).square().sum()

        assert_close(*(torch.func.grad(total(method))(routing) for method in ("grouped", "matmul")))

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_a_trace(self) -> None:
        x, kernels = draw_channels_last(2)[0].detach(), torch.randn(2 * 3, 4, 3, 3, dtype=torch.float64)
        geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
        traced = torch.jit.trace(lambda x: convolve(x, kernels, geometry), x)
        other = torch.randn_like(x)
        assert_close(traced(other), convolve(other, kernels, geometry))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_in_lower_precision(self, dtype: torch.dtype) -> None:
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in draw_channels_last()]
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        y, expected = dynamic_conv2d(*tensors, padding=1, method="grouped"), loop(*wide, padding=1)
        assert_close(y.double(), expected, dtype)
        found = torch.autograd.grad(y, tensors, torch.ones_like(y))
        for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), wide), strict=True):
            assert_close(ours.double() / theirs.abs().max(), theirs / theirs.abs().max(), dtype)

    @pytest.mark.parametrize("method", METHODS)
    def test_compiled(self, method: str) -> None:
        torch.compiler.reset()
        tensors = draw_channels_last()
        compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend="aot_eager")
        y, expected = compiled(*tensors, padding=1, method=method), loop(*tensors, padding=1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, expected)
        assert_close(*(torch.autograd.grad(output.square().sum(), tensors) for output in (y, expected)))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 96, 40, 40), 2),  # 307,200 numbers
        ((2, 91, 40, 40), 1),
        ((1, 96, 56, 56), 1),
    ],
)
def test_small_maps_and_one_image_have_one_convolution(shape: tuple[int, ...], expected: int) -> None:
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    routing, weight = torch.rand(shape[0], 2), torch.randn(2, 96, shape[1], 3, 3)
    assert convolutions(lambda: dynamic_conv2d(x, routing, weight, padding=1, method="grouped")) == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_contiguous_maps_stay_so_where_a_compiler_would_change_them(groups: int) -> None:
    torch.compiler.reset()
    tensors = draw(3, groups=groups)
    compiled = torch.compile(dynamic_conv2d, fullgraph=True)  # by inductor
    y = compiled(*tensors, padding=1, groups=groups, method="grouped")
    expected = loop(*tensors, padding=1, groups=groups)
    assert_close(y, expected)
    with torch.autograd.profiler.profile() as profile:
        found = torch.autograd.grad(y.square().sum(), tensors)
    assert "dyn_lightning::convolve_backward" in {event.name for event in profile.function_events}
    assert_close(found, torch.autograd.grad(expected.square().sum(), tensors))
