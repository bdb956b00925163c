"""The gradient of depthwise kernels against torch's, which it stands in for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import depthwise
from dyn_lightning.per_sample.depthwise import convolve, has_slow_gradient, padded_numbers
from dyn_lightning.per_sample.geometry import Geometry, Pair
from tests.per_sample.loop import assert_equals_the_loop, loop
from tests.tolerances import assert_close

# Kernel's rows and columns, stride, padding, the map's rows and columns.
SHAPES = [
    ((5, 5), (1, 1), (2, 2), (7, 6)),
    ((5, 5), (2, 2), (2, 2), (8, 9)),
    ((5, 4), (2, 1), (0, 3), (9, 5)),
    ((3, 7), (1, 2), (1, 3), (4, 11)),
    ((3, 3), (1, 1), (1, 1), (2, 2)),
    ((3, 3), (2, 2), (1, 1), (3, 3)),
    ((7, 7), (3, 2), (6, 0), (5, 12)),
    ((2, 9), (1, 1), (0, 4), (2, 1)),  # pieces that see zeros alone
    ((3, 3), (7, 7), (4, 4), (1, 1)),  # the rows of all pieces do
    ((1, 5), (5, 5), (2, 2), (1, 3)),
]
SMALL = {"padding": (1, 2), "groups": 4}  # of `draw`, whose gradient of 3x5 kernels is slow


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small maps have the gradient too, and numbers of 8 bytes."""
    monkeypatch.setattr(depthwise, "LEAST_NUMBERS", 0)
    monkeypatch.setattr(depthwise, "MOST_BYTES", 8)
    monkeypatch.setattr(depthwise, "_found", has_slow_gradient)  # nothing of other tests is remembered


always = pytest.mark.usefixtures("_always")


def draw(batch: int = 3, dtype: torch.dtype = torch.float64, columns: int = 5) -> tuple[Tensor, ...]:
    """Draw input, routing, weight and bias of a depthwise convolution: 4 channels, 3 kernels."""
    torch.manual_seed(0)
    shapes = (batch, 4, 7, 6), (batch, 3), (3, 4, 1, 3, columns), (3, 4)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def backward_calls(function: Callable[[], Any]) -> int:
    """Count the convolutions' backward passes: one in torch's way, one for the input and for each piece in ours."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return sum(event.name == "aten::convolution_backward" for event in profile.function_events)


@always
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torchs(kernel: Pair, stride: Pair, padding: Pair, size: Pair, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    kernels = torch.randn(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    geometry = Geometry(stride, padding, (1, 1), 3)
    expected = F.conv2d(x, kernels, None, *geometry)
    y, cotangent = convolve(x, kernels, geometry), torch.randn_like(expected)
    assert "_Convolution" in type(y.grad_fn).__name__
    assert_close(y, expected)
    assert_close(*(torch.autograd.grad(out, (x, kernels), cotangent, retain_graph=True) for out in (y, expected)))
    for one in (x, kernels):
        assert_close(*(torch.autograd.grad(out, one, cotangent, retain_graph=True)[0] for out in (y, expected)))


@pytest.mark.parametrize(("kernel", "size"), [(5, 7), (3, 2)])
def test_single_precision(kernel: int, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4096, size, size, requires_grad=True)
    kernels = torch.randn(4096, 1, kernel, kernel, requires_grad=True)
    geometry = Geometry((1, 1), (kernel // 2, kernel // 2), (1, 1), 4096)
    y, expected = convolve(x, kernels, geometry), F.conv2d(x, kernels, None, *geometry)
    assert "_Convolution" in type(y.grad_fn).__name__
    cotangent = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(out, (x, kernels), cotangent) for out in (y, expected)))


@always
def test_derivatives_of_any_order() -> None:
    x, _, weight, _ = draw()
    x, kernels = x[:1, :, :3, :4].detach().requires_grad_(), weight[0].detach().requires_grad_()
    geometry = Geometry((1, 2), (1, 2), (1, 1), 4)

    def function(x: Tensor, kernels: Tensor) -> Tensor:
        return convolve(x, kernels, geometry)

    assert gradcheck(function, (x, kernels), check_batched_grad=True)
    assert gradgradcheck(function, (x, kernels))
    assert gradcheck(function, (x.detach(), kernels))


@always
@pytest.mark.parametrize("method", ["grouped", "chunked"])
class TestMixedKernels:
    def test_equal_a_loop(self, method: str) -> None:
        for limit in (1, 1 << 20):
            assert_equals_the_loop(draw(), method, limit, **SMALL)

    def test_images_without_a_gradient(self, method: str) -> None:
        tensors = draw()
        leaves = tensors[1:3]
        outputs = (function(tensors[0].detach(), *leaves, **SMALL) for function in (_by(method), loop))
        assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in outputs))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
    def test_transforms(self, method: str) -> None:
        x, routing, weight, _ = (tensor.detach() for tensor in draw())
        for take in (torch.func.grad, torch.func.hessian):
            found, expected = (
                take(lambda shares, f=f: f(x, shares, weight, **SMALL).square().sum())(routing)
                for f in (_by(method), loop)
            )
            assert_close(found, expected)
        tangent = (torch.randn_like(weight),)
        found, expected = (
            torch.func.jvp(lambda w, f=f: f(x, routing, w, **SMALL), (weight,), tangent) for f in (_by(method), loop)
        )
        assert_close(found, expected)

    def test_complex_numbers(self, method: str) -> None:
        tensors = draw(dtype=torch.complex128)
        outputs = [function(*tensors, **SMALL) for function in (_by(method), loop)]
        found, expected = (torch.autograd.grad(y, tensors, torch.ones_like(y)) for y in outputs)
        assert_close([*map(torch.view_as_real, found)], [*map(torch.view_as_real, expected)])

    @pytest.mark.parametrize("inside", [True, False])
    def test_bfloat16_autocast(self, method: str, inside: bool) -> None:
        tensors = draw(dtype=torch.float32)[:3]
        with torch.autocast("cpu", torch.bfloat16):
            y = _by(method)(*tensors, **SMALL)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found = torch.autograd.grad(y, tensors, torch.ones_like(y))
        expected = torch.autograd.grad(loop(*tensors, **SMALL).sum(), tensors)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), torch.bfloat16)

    def test_a_checkpoint(self, method: str) -> None:
        tensors = draw()
        y = checkpoint(_by(method), *tensors, use_reentrant=False, **SMALL)
        found = torch.autograd.grad(y.square().sum(), tensors)
        assert_close(found, torch.autograd.grad(loop(*tensors, **SMALL).square().sum(), tensors))

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_compiled_to_one_graph(self, method: str, dynamic: bool) -> None:
        def step(*tensors: Tensor) -> Tensor:
            return _by(method)(*tensors, **SMALL)

        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 5) if dynamic else (3,):
            tensors = draw(batch)
            y, found = compiled(*tensors).square().sum(), []
            calls = backward_calls(lambda: found.extend(torch.autograd.grad(y, tensors)))  # noqa: B023
            assert_close(found, torch.autograd.grad(step(*tensors).square().sum(), tensors))
            assert calls == 3 or method == "chunked"  # whose backward pass is one operation


@always
def test_large_maps_in_channels_last_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 40, 40, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    tensors = (
        x,
        torch.rand(2, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 32, 1, 5, 5, dtype=torch.float64, requires_grad=True),
    )
    assert_equals_the_loop(tensors, "chunked", padding=2, groups=32)


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
    assert has_slow_gradient(x, kernels, geometry, 4, "cpu") == slow
    assert not has_slow_gradient(x, kernels, geometry, 8, "cpu")
    assert not has_slow_gradient(x, kernels, geometry, 4, "cuda")
    assert not has_slow_gradient(x, kernels, geometry._replace(dilation=(2, 2)), 4, "cpu")
    assert not has_slow_gradient(x, (8192, *kernels[1:]), geometry, 4, "cpu")
    assert not has_slow_gradient((1, 2, *x[2:]), (2, *kernels[1:]), geometry._replace(groups=2), 4, "cpu")


@always
def test_what_pieces_see() -> None:
    geometry = Geometry((1, 1), (2, 2), (1, 1), 4)
    assert padded_numbers((8, 4, 7, 6), (3, 4, 1, 5, 5), geometry, 4, "cpu") == 4 * 7 * (6 + 2)
    assert padded_numbers((8, 4, 4, 6), (3, 4, 1, 5, 5), geometry, 4, "cpu") == 4 * (4 + 4) * (6 + 2)
    assert padded_numbers((8, 4, 7, 6), (3, 4, 1, 5, 5), geometry, 16, "cpu") == 0


@always
@pytest.mark.parametrize("strict", [True, False])
def test_an_export_does_without(strict: bool) -> None:
    layer = DynamicConv2d(8, 8, 5, padding=2, groups=8)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    exported = torch.export.export(layer, (torch.randn(4, 8, 9, 9),), dynamic_shapes=dynamic, strict=strict)
    x = torch.randn(3, 8, 9, 9)
    assert_close(exported.module()(x), layer(x))


def _by(method: str) -> Callable[..., Tensor]:
    return lambda *tensors, **geometry: dynamic_conv2d(*tensors, method=method, **geometry)
