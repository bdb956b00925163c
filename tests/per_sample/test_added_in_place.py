from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.per_sample import added_in_place
from tests.per_sample.loop import assert_equals_the_loop, draw
from tests.tolerances import assert_close

VIEWS = [  # where the convolution's gradient is a view
    *(("grouped", kernel_size, groups) for kernel_size in (1, 3) for groups in (1, 8)),
    ("matmul", 1, 1),
    ("matmul", 1, 8),
    ("mixture", 1, 1),
]


def routed() -> tuple[Tensor, ...]:
    """Draw tensors whose routing weights were computed."""
    input, routing, *rest = draw()
    return input, routing * 1, *rest


@pytest.mark.parametrize(("method", "kernel_size", "groups"), VIEWS)
def test_the_routers_gradient_is_added_in_place(
    method: str, kernel_size: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DynamicConv2d(16, 16, kernel_size, padding=kernel_size // 2, groups=groups, method=method)
    x = torch.randn(8, 16, 64, 64, requires_grad=True)

    def additions() -> list[str]:
        x.grad = None
        y = layer(x * 2)
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            y.backward(torch.ones_like(y))
        events = [(event.name, event.input_shapes[0]) for event in profile.function_events if event.input_shapes]
        return [name for name, shape in events if name.startswith("aten::add") and shape == [*x.shape]]

    assert additions() == ["aten::add_"]
    monkeypatch.setattr(added_in_place, "LARGE_MAP", 1 << 60)
    assert additions() == ["aten::add"]


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("routed", [True, False])
def test_a_small_map_and_one_that_is_used_once_are_left_alone(size: int, routed: bool) -> None:
    x = torch.randn(8, 16, size, size, requires_grad=True)
    routing = torch.randn(8, 4, requires_grad=True)
    found = added_in_place.added_in_place(x, routing.softmax(1) if routed else routing)
    assert (found is x) == (size == 8 or not routed)


class TestAllMaps:
    @pytest.fixture(autouse=True)
    def _all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(added_in_place, "LARGE_MAP", 0)
        x = torch.ones(1, requires_grad=True)
        assert added_in_place.added_in_place(x, x * 2) is not x

    @pytest.mark.parametrize("method", ["grouped", "matmul", "mixture", "chunked"])
    @pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"padding": "same"}])
    def test_equals_the_loop(self, method: str, geometry: dict[str, Any]) -> None:
        assert_equals_the_loop(routed(), method, **geometry)

    @pytest.mark.parametrize("build", [CondConv2d, DynamicConv2d])
    def test_with_a_shortcut_and_what_is_kept_of_gradients(self, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x = build(4, 4, 3, padding=1).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)

        def gradients() -> list[Tensor]:
            features = (x * 2).relu()
            features.retain_grad()
            y = layer(features)
            y.retain_grad()
            (y.square() + features).sum().backward()
            found = [y.grad, features.grad, x.grad, *(parameter.grad for parameter in layer.parameters())]
            layer.zero_grad()
            x.grad = None
            return found  # type: ignore[return-value]

        found = gradients()
        monkeypatch.setattr(added_in_place, "LARGE_MAP", 1 << 60)
        assert_close(found, gradients())

    @pytest.mark.parametrize("kernel_size", [1, 3])
    @pytest.mark.parametrize("method", ["grouped", "matmul", "mixture", "chunked"])
    def test_a_map_that_is_changed_afterwards(
        self, method: str, kernel_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error, or the gradient where nothing is lost, is that of before."""
        layer = DynamicConv2d(4, 4, kernel_size, method=method)
        x = torch.randn(2, 4, 5, 6, requires_grad=True)

        def outcome() -> Tensor | str:
            features = x * 2
            y = layer(features)
            try:
                features.relu_()
                return torch.autograd.grad(y.sum(), x)[0]
            except RuntimeError as error:
                return str(error).partition("[")[0]

        found = outcome()
        monkeypatch.setattr(added_in_place, "LARGE_MAP", 1 << 60)
        expected = outcome()
        assert type(found) is type(expected)
        assert found == expected if isinstance(found, str) else torch.equal(found, expected)  # type: ignore[arg-type]

    def test_second_derivatives(self) -> None:
        tensors = draw(2, (4, 3))

        def convolve(input: Tensor, routing: Tensor, *rest: Tensor) -> Tensor:
            return dynamic_conv2d(input, routing * 1, *rest, padding=1)

        assert torch.autograd.gradcheck(convolve, tensors)
        assert torch.autograd.gradgradcheck(convolve, tensors)

    def test_several_cotangents_and_checkpoints(self) -> None:
        tensors = routed()
        y = dynamic_conv2d(*tensors)
        cotangents = torch.randn(3, *y.shape, dtype=y.dtype)
        together = torch.autograd.grad(y, tensors, cotangents, is_grads_batched=True, retain_graph=True)
        singly = [torch.autograd.grad(y, tensors, one, retain_graph=True) for one in cotangents]
        assert_close(together, [torch.stack(same) for same in zip(*singly, strict=True)])
        again = checkpoint(dynamic_conv2d, *tensors, use_reentrant=False)
        assert_close(torch.autograd.grad(again, tensors, cotangents[0]), singly[0])

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own making
    def test_compiled_backward_pass(self) -> None:
        layer, x = DynamicConv2d(4, 4, 3, padding=1), torch.randn(2, 4, 5, 6, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x * 2).square().sum(), x)
        loss = layer(x * 2).square().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss.backward()
        assert_close(x.grad, expected)

    def test_under_function_transforms(self) -> None:
        input, routing, weight, _ = (tensor.detach() for tensor in draw(4))

        def energy(image: Tensor, row: Tensor) -> Tensor:
            return dynamic_conv2d(image[None], row[None], weight).square().sum()

        each = torch.func.vmap(torch.func.grad(energy))(input, routing)
        shares = routing.requires_grad_() * 1
        (expected,) = torch.autograd.grad(dynamic_conv2d(input.requires_grad_(), shares, weight).square().sum(), input)
        assert_close(each, expected)
