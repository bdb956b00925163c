from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.per_sample import processor
from dyn_lightning.per_sample.geometry import Geometry, Pair, output_size
from dyn_lightning.per_sample.methods import matmul, mix_kernels
from tests.contract import GEOMETRIES
from tests.per_sample.loop import assert_equals_the_loop, draw, loop
from tests.tolerances import assert_close


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"padding": (1, 2)}])
def test_one_weight_a_channel_is_multiplied_as_a_number(layout: torch.memory_format, geometry: dict[str, Any]) -> None:
    """In bfloat16 products of matrices of one number each take ten times as long."""
    shapes = (5, 4, 3, 2), (5, 3), (3, 4, 1, 1, 1)
    x, *tensors = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    assert matmul(x.to(memory_format=layout), *tensors, Geometry((1, 1), (0, 0), (1, 1), 4)).is_contiguous(
        memory_format=layout
    )
    leaves = tuple(tensor.requires_grad_() for tensor in (x.to(memory_format=layout), *tensors))
    with torch.autograd.profiler.profile() as profile:
        assert_equals_the_loop(leaves, "matmul", groups=4, **geometry)
    assert "aten::bmm" not in {event.name for event in profile.function_events}


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "size", "geometry"),
    [
        (1, (7, 6), {}),
        (1, (1, 1), {}),
        (3, (2, 2), {"padding": 1}),
        (3, (2, 2), {"stride": 2, "padding": 1}),
        (1, (2, 1), {}),
        (1, (1, 2), {"stride": 2, "padding": 1}),
        (3, (5, 6), {"dilation": 2}),
    ],
)
@pytest.mark.parametrize("method", ["matmul", "mixture"])
class TestOneImageAndFewColumns:
    @pytest.mark.parametrize("intel", [True, False])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_equal_the_loop(
        self,
        batch: int,
        intel: bool,
        kernel: int,
        size: Pair,
        geometry: dict[str, int],
        layout: Any,
        method: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Columns are laid out side by side, or not.
        monkeypatch.setattr(processor, "_vendor", lambda: "GenuineIntel" if intel else "")
        input, *others = draw(batch, size, (kernel, kernel))
        input = input.detach().contiguous(memory_format=layout).requires_grad_()
        assert_equals_the_loop((input, *others), method, **geometry)

        def compute(*tensors: Tensor) -> Tensor:
            return dynamic_conv2d(*tensors, method=method, **geometry)

        if batch == 1:
            gradgradcheck(compute, (input, *others), fast_mode=True)
        half = [tensor.detach().bfloat16() for tensor in (input, *others)]
        y = compute(*half)
        assert y.dtype == torch.bfloat16
        assert_close(y.double(), loop(*[tensor.double() for tensor in half], **geometry), torch.bfloat16)

    def test_per_sample_gradients(
        self, kernel: int, size: Pair, geometry: dict[str, int], layout: Any, method: str
    ) -> None:
        input, routing, weight, _ = (tensor.detach() for tensor in draw(3, size, (kernel, kernel)))
        input = input.contiguous(memory_format=layout)

        def loss(weight: Tensor, x: Tensor, shares: Tensor) -> Tensor:
            return dynamic_conv2d(x[None], shares[None], weight, method=method, **geometry).square().sum()

        gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, input, routing)
        leaf = weight.clone().requires_grad_()
        for b in range(3):
            y = loop(input[b : b + 1], routing[b : b + 1], leaf, **geometry)
            assert_close(gradients[b], torch.autograd.grad(y.square().sum(), leaf)[0])


@pytest.mark.parametrize("method", ["matmul", "mixture"])
@pytest.mark.parametrize(("batch", "size"), [(1, (1, 1)), (1, (2, 1)), (3, (2, 2)), (1, (7, 6))])
def test_compiled_one_image_and_few_columns(batch: int, size: Pair, method: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend="aot_eager")
    tensors = draw(batch, size, (1, 1))
    y, expected = compiled(*tensors, method=method), dynamic_conv2d(*tensors, method=method)
    assert_close(y, expected)
    assert_close(*(torch.autograd.grad(out.square().sum(), tensors) for out in (y, expected)))
